"""The runtimes that run a network: one file or folder each."""
