"""The page that shows a comparison: which network to ship, and why."""
