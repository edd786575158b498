"""Data sets by name or place, split three ways, and batches of them ready for a network."""
