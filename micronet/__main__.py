"""The command ``micronet``, which Ctrl-C ends without a traceback even while it starts, and ``python -m micronet``."""

import os
import signal


def main() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in background jobs of shells
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    from micronet.cli.app import main as run
    from micronet.cli.process import open_streams

    open_streams()
    run()


if __name__ == "__main__":
    main()
