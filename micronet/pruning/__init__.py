"""Channel pruning: which channels belong together, which go, and cutting them out of the weights."""
