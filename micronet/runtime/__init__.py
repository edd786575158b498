"""What runs a network: each runtime opens a file as a predictor, images in, scores out."""
