"""Which of several processes this one is, as torchrun tells them in the environment. No torch here."""

import os


def rank() -> int:
    """Return this process's number among all of them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes there are, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))
