"""The pages in docs/."""
