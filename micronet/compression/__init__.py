"""Choosing a plan for a network: candidates are recipes, costs are measured, drops are confirmed on validation data."""
