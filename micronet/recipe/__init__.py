"""Recipes: stages as data in a TOML file, checked as a whole before the first one runs."""
