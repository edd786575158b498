"""Stages: what a command does, as library objects. The command line, recipes and the Python API all call these."""
