"""Which of several processes this one is, as torchrun tells them in the environment. No torch here."""

import os

from micronet.errors import MicronetError

LAUNCHED = "MICRONET_LAUNCHED"  # set where our own launcher watches: it says what a lost process or Ctrl-C is
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # schedulers set some of them for purposes of their own
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def is_distributed() -> bool:
    """Tell whether something like torchrun has started this process: all that it tells one is there."""
    return all(name in os.environ for name in _NEEDED)


def is_launched() -> bool:
    """Tell whether our own launcher watches this process."""
    return is_distributed() and LAUNCHED in os.environ


def check_environment() -> None:
    """Raise MicronetError where what torchrun tells is there but is no number."""
    for name in _NUMBERS:
        if is_distributed() and not os.environ.get(name, "0").isdigit():
            raise MicronetError(
                f"the environment's {name} is {os.environ[name]!r}, no number; unset {name}, or let torchrun set it"
            )


def rank() -> int:
    """Return this process's number among all of them, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Return this process's number among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """Return how many processes there are, over all machines."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Return how many processes there are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def shard(count: int) -> slice:
    """Return this process's part of ``count`` items; the parts differ by one item at most."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def _number(name: str, alone: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if is_distributed() and text.isdigit() else alone
