"""Networks as files that other runtimes open."""
