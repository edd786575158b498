"""What a network's outputs mean: the loss, the metrics and the data of classification, segmentation and others."""
