"""The packed format: a network at its weights' true width."""
