"""What runs a network: one file or folder for each runtime."""
