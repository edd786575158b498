"""The command ``micronet``, which Ctrl-C ends without a traceback even while it starts, and ``python -m micronet``."""

import sys


def main() -> None:
    """Run the command line and exit."""
    try:
        from micronet.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
