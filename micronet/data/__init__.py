"""Data sets by name, folder or file: three splits, and batches of them for a network."""
