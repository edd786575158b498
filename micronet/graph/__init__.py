"""A network as a graph of tensors: tracing, operator tables, rewriting."""
