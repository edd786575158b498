"""Damaged and hostile files of every kind that a command reads; scripts/fuzz tries thousands more."""
