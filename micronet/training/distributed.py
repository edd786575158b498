"""Several processes as one: who they are to each other, and the few things they tell each other.

In a process that is alone every function here changes nothing, so whoever calls them need not ask. Process 0 leads: it
alone reads checkpoints, writes files and prints; the others follow what it says and see their part of every batch.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from micronet.core import ranks
from micronet.errors import USER_ERRORS, FailedError, MicronetError, first_line

WAIT = timedelta(hours=2)  # for one another: while process 0 reads a checkpoint or saves, the others wait
MEETING = timedelta(minutes=10)  # of all processes, on however many machines, before they begin
TELLING = timedelta(seconds=10)  # for another process's line
LOST = 4  # exit code of a process that lost another one and leaves it to our launcher to say so
RESUME = "the same command with --resume goes on from its last checkpoint, if it had written one"
T = TypeVar("T")


class ProcessExitError(Exception):
    """The end of a process of several, after one of them has said why. ``exit_code``: the same in all of them."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


@contextmanager
def process_group(tell: Callable[[Exception], int]) -> Iterator[None]:
    """Be one of the processes that the environment tells of, inside this context.

    Of the errors that a user can cause, and of the loss of another process, the first is told by ``tell``, which
    returns an exit code, in whichever process it is; ProcessExitError is raised in each. One that does not meet the others
    tells that itself.
    """
    try:
        store, world = _meet()
    except FailedError as error:
        raise ProcessExitError(tell(error)) from error
    try:
        yield
    except USER_ERRORS as error:
        raise ProcessExitError(_tell_once(error, tell, store)) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = FailedError(f"another of the {world} processes ended; {RESUME}")
        raise ProcessExitError(_tell_once(lost, (lambda _: LOST) if ranks.is_launched() else tell, store)) from error
    finally:
        dist.destroy_process_group()


def _meet() -> tuple[Any, int]:
    """Join the processes that the environment tells of; return the store they share and how many they are.

    Raises FailedError where this one cannot reach them.
    """
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=MEETING)))
        store.set_timeout(WAIT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise FailedError(
            f"process {ranks.rank()} of {ranks.world_size()} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({first_line(error)}); start all of them, with "
            "the first machine's address and a port that is free there (torchrun's --master-addr and --master-port)"
        ) from error
    return store, world


def _tell_once(error: Exception, tell: Callable[[Exception], int], store: Any) -> int:
    """Tell an error unless another process has one to tell, and wait for that; return the exit code of all.

    The launcher ends the other processes when one has ended, so none may end before it is told.
    """
    with suppress(RuntimeError):  # who kept the count, or was to tell, is gone
        if store.add("micronet-errors", 1) > 1:
            store.wait(["micronet-exit-code"], TELLING)
            return int(store.get("micronet-exit-code"))
    code = tell(error)
    with suppress(RuntimeError):
        store.set("micronet-exit-code", str(code))
    return code


def world_size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_batches() -> slice:
    """Return which items of a list are this process's: every second one of two processes, and so on."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def from_rank_zero(work: Callable[[], T]) -> T:
    """Return what ``work`` gives in process 0, where alone it runs; its error is raised in all of them."""
    if world_size() == 1:
        return work()
    said: list[Any] = [None]
    if is_rank_zero():
        try:
            said = [work()]
        except USER_ERRORS as error:
            said = [error]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    if isinstance(said[0], USER_ERRORS):
        raise said[0]
    result: T = said[0]
    return result


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def range_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of all processes' ``low`` and the greatest of their ``high``, in one message."""
    if world_size() == 1:
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def broadcast_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give every process the weights, buffers and optimizer state of process 0."""
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        same = tensor.contiguous()  # a message has no memory layout
        dist.broadcast(same, src=0)
        tensor.copy_(same)
    if optimizer is not None:
        state = from_rank_zero(optimizer.state_dict)
        if not is_rank_zero():
            optimizer.load_state_dict(state)


def local_device(name: str | None) -> str | None:
    """Return the device of this process: ``name``, or of several GPUs (``0,1`` or any) the one that is its own.

    Raises MicronetError where one GPU is named for several processes.
    """
    if name is not None and name[:1].isdigit():
        numbers = name.split(",")
        if ranks.local_rank() >= len(numbers):
            raise MicronetError(f"--device {name} names {len(numbers)} GPUs for more processes; name one for each")
        return f"cuda:{numbers[ranks.local_rank()]}"
    if world_size() == 1 or name == "cpu" or (name is None and not torch.cuda.is_available()):
        return name
    if name is not None and name != "cuda":
        raise MicronetError(f"--device {name} is one device for several processes; give --device 0,1 or cpu")
    return f"cuda:{ranks.local_rank()}"
