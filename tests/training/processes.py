"""Commands in processes of their own, which can be killed; forked from one that has imported torch, to start fast."""

import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "micronet.cli.app", "micronet.training.loop"])


class Command:
    """A running ``micronet`` command."""

    def __init__(self, log, *arguments, file_bytes=None, **environment):
        self._log = Path(log)
        words = list(map(str, arguments))
        self._process = CONTEXT.Process(target=_main, args=(words, str(log), file_bytes, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Return the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=240):
        """Wait for its end; return the exit code."""
        self._process.join(timeout)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def wait_for(self, path, changed_since=None):
        """Wait until a file is there, or is newer than a time, or the process has ended."""
        while not path.exists() or path.stat().st_mtime_ns == changed_since:
            if wait([self._process.sentinel], 0.002):
                raise AssertionError(self.errors())
        return path

    def errors(self):
        """Return the lines of its standard error, without the epochs' and the preset's."""
        return [line for line in self._log.read_text().splitlines() if not line.startswith(("epoch ", "fast: "))]


def _main(words, log, file_bytes, environment):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = ["micronet", *words]
    from micronet.cli.app import main

    main()
