"""One file a criterion: what a channel is worth, and the training penalty that makes the difference clear."""
