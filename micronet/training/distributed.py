"""Several processes that train one network, and the messages between them.

Rank 0 alone reads checkpoints, writes files and prints; every rank computes its part of each batch. In a single process
all functions here do nothing, so callers need not check.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from micronet.core import ranks
from micronet.errors import USER_ERRORS, FailedError, MicronetError, count, first_line

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # others wait while rank 0 reads or writes a checkpoint
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all ranks, on all machines, to start
REPORT_TIMEOUT = timedelta(seconds=10)  # for another rank to report its error
LOST = 4  # exit code of a rank that lost another one, if our launcher reports that
RESUME = "rerun the same command with --resume to continue from the last checkpoint, if any"
T = TypeVar("T")


class ProcessExitError(Exception):
    """The end of a rank after some rank has reported an error; ``exit_code`` is the same on all ranks."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exiting with code {exit_code}")
        self.exit_code = exit_code


@contextmanager
def process_group(report: Callable[[Exception], int]) -> Iterator[None]:
    """Join the process group that the environment describes, inside this context.

    ``report`` shows an error to the user and returns the exit code. Only the first rank to fail with a user's error, or
    to lose another rank, reports it; all then raise ProcessExitError with its code. A rank that cannot join reports
    that itself.
    """
    try:
        store, world = _join()
    except FailedError as error:
        raise ProcessExitError(report(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # 1x1 kernels have two layouts
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.9 lacks its successor
            yield
    except USER_ERRORS as error:
        raise ProcessExitError(_report_once(error, report, store)) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = FailedError(f"one of the {world} processes ended unexpectedly; {RESUME}")
        by = (lambda _: LOST) if ranks.is_launched() else report
        raise ProcessExitError(_report_once(lost, by, store)) from error
    finally:
        dist.destroy_process_group()


def _join() -> tuple[Any, int]:
    """Join the process group; return the store that the ranks share and the world size."""
    try:
        store, own_rank, world = next(iter(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise FailedError(
            f"process {ranks.rank()} of {ranks.world_size()} could not reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({first_line(error)}); start every process with "
            "the address of the first machine and a free port on it (torchrun --master-addr, --master-port)"
        ) from error
    return store, world


def _report_once(error: Exception, report: Callable[[Exception], int], store: Any) -> int:
    """Report an error, or wait for the rank that is already reporting one; return the exit code of all ranks.

    The launcher kills the other ranks when one exits, so none may exit before the report.
    """
    with suppress(RuntimeError):  # the rank that holds the store, or was to report, is gone
        if store.add("micronet-errors", 1) > 1:
            store.wait(["micronet-exit-code"], REPORT_TIMEOUT)
            return int(store.get("micronet-exit-code"))
    code = report(error)
    with suppress(RuntimeError):
        store.set("micronet-exit-code", str(code))
    return code


def world_size() -> int:
    """Return the number of ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank in the process group; 0 without one. Rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 only; return its result, or raise its error, on all ranks."""
    if world_size() == 1:
        return work()
    message: list[Any] = [None]
    if rank() == 0:
        try:
            message = [work()]
        except USER_ERRORS as error:
            message = [error]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    if isinstance(message[0], USER_ERRORS):
        raise message[0]
    result: T = message[0]
    return result


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def add_up_parts(part: Tensor) -> Tensor:
    """Return the sum of the parts of all ranks, on the CPU; a rank that has none gives an empty tensor of any shape."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    filled = [each for each in parts if each.numel()] or [part]
    return torch.stack(filled).sum(0)


def range_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum of ``low`` and the maximum of ``high`` over all ranks, in one message."""
    if world_size() == 1:
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def broadcast_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Copy weights, buffers and the optimizer's state of rank 0 to all ranks."""
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        message = tensor.contiguous()  # broadcast ignores memory formats
        dist.broadcast(message, src=0)
        tensor.copy_(message)
    if optimizer is not None:
        state = from_rank_zero(optimizer.state_dict)
        if rank() > 0:
            optimizer.load_state_dict(state)


def local_device(name: str | None) -> str | None:
    """Return the name of this rank's device: ``name``, its own one of a list of GPUs (``0,1``), or None for the best.

    Raises MicronetError if one GPU is named for several ranks.
    """
    if name is not None and name[:1].isdigit():
        numbers = name.split(",")
        if ranks.local_rank() >= len(numbers):
            raise MicronetError(
                f"--device {name} lists {count(len(numbers), 'GPU')} for "
                f"{count(ranks.local_world_size(), 'process')}; list one per process"
            )
        return f"cuda:{numbers[ranks.local_rank()]}"
    if world_size() == 1 or name == "cpu" or (name is None and not torch.cuda.is_available()):
        return name
    if name is not None and name != "cuda":
        raise MicronetError(f"--device {name} is one GPU for several processes; use --device 0,1 or --device cpu")
    return f"cuda:{ranks.local_rank()}"
