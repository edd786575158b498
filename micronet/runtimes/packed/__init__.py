"""Networks in their smallest form, run without torch."""
