"""``python -m micronet``."""

from micronet.cli.app import main

main()
