"""The compiled kernels of the packed runtime."""
