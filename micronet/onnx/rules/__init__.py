"""The rules of the linter: on layers, on the quantizers of activations, and on how integers are stored."""
