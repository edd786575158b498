"""The rank of this process among several, from torchrun's environment variables. No torch here."""

import os
from functools import partial

from micronet.errors import MicronetError

LAUNCHED = "MICRONET_LAUNCHED"  # set by our own launcher, which reports lost processes and Ctrl-C itself
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # schedulers set some of them for other purposes
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def is_distributed() -> bool:
    """Return True if torchrun or a similar launcher has started this process."""
    return all(name in os.environ for name in _NEEDED)


def is_launched() -> bool:
    """Return True if our own launcher has started this process."""
    return is_distributed() and LAUNCHED in os.environ


def check_environment() -> None:
    """Raise MicronetError if a launcher's variable is not a number."""
    for name in _NUMBERS:
        if is_distributed() and not os.environ.get(name, "0").isdigit():
            raise MicronetError(
                f"the environment variable {name} is {os.environ[name]!r}, not a number; unset it or use torchrun"
            )


def _number(name: str, alone: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if is_distributed() and text.isdigit() else alone


rank = partial(_number, "RANK", 0)  # this process's, from 0
local_rank = partial(_number, "LOCAL_RANK", 0)  # this process's on its machine, from 0
world_size = partial(_number, "WORLD_SIZE", 1)  # the number of processes on all machines
local_world_size = partial(_number, "LOCAL_WORLD_SIZE", 1)  # the number of processes on this machine


def shard(count: int) -> slice:
    """Return this rank's part of ``count`` items; parts differ by at most one item."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())
