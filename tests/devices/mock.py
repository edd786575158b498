"""A second device made of CPU memory, which shows device mistakes on a machine without a GPU.

``register()`` makes ``torch.device("mock")`` known to this process for good, so call it only in a process of its own.
Operators run on the CPU and give the CPU's numbers to the last bit. As on a GPU, an operator refuses tensors of two
devices (except CPU tensors without dimensions), ``numpy()`` refuses a tensor of the device, and ``module.to`` keeps the
module's parameters. The device is one of torch's experimental Python backends (``torch.utils.backend_registration``);
it was written for torch 2.14.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "mock"
KEY = "PrivateUse1"  # torch's dispatch key for devices that it does not bring itself
AUTOCAST = f"Autocast{KEY}"
CPU = torch.device("cpu")
# Operators that copy between devices, compare their kinds, or take indices from the CPU, as CUDA's do.
MIXING = ("aten::copy_", "aten::_copy_from", "aten::_has_compatible_shallow_copy_type", "aten::index.Tensor",
          "aten::index_put", "aten::_index_put_impl_")  # fmt: skip
# The CPU's autocast (ATen/autocast_mode.h), as far as the networks here use it.
IN_32_BITS = ("cross_entropy_loss", "nll_loss", "mse_loss")
IN_16_BITS = ("conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
_libraries: list[torch.library.Library] = []  # a registration ends when its library is collected


def register() -> None:
    """Make the device known to this process."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters survive module.to, as on a GPU
    operators = torch.library.Library("_", "IMPL")
    operators.fallback(_run, KEY)
    operators.fallback(torch.library.fallthrough_kernel, AUTOCAST)
    copies = torch.library.Library("aten", "IMPL", KEY)
    copies.impl("_to_copy", partial(_run, torch.ops.aten._to_copy.default))  # the fallback does not serve torch.tensor
    autocast = torch.library.Library("aten", "IMPL", AUTOCAST)
    for name in IN_16_BITS + IN_32_BITS:
        autocast.impl(name, _autocast(getattr(torch.ops.aten, name).default, narrow=name in IN_16_BITS))
    _libraries.extend([operators, copies, autocast])


class Backend:
    """The module ``torch.mock``: what torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: random numbers come from the CPU's generator."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class MockTensor(torch.Tensor):
    """A tensor of the device.

    Attributes:
        raw: The CPU tensor that holds its values, of the same shape, strides and dtype.
    """

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    __format__ = object.__format__

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "MockTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        wrapper.raw = raw
        return wrapper

    def __init__(self, raw: torch.Tensor) -> None:
        """Do nothing: ``__new__`` has made the tensor."""

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "MockTensor":
        """Copy a leaf. Torch's own way copies the wrapper's storage, which is empty."""
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "raw"})
            copied.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = copied
        found: MockTensor = memo[id(self)]
        return found

    def __repr__(self, **options: Any) -> str:
        return f"{NAME}({self.raw})"

    def data_ptr(self) -> int:
        """Return the address of the values, by which tied tensors are recognised."""
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **options: Any) -> Any:
        """Refuse, as CUDA's tensors do."""
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU and wrap the tensors that it makes."""
    own: list[MockTensor] = []
    on_cpu: list[torch.Tensor] = []
    devices: list[torch.device] = []

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, MockTensor):
            own.append(leaf)
            return leaf.raw
        if isinstance(leaf, torch.device):
            devices.append(leaf)
            return CPU
        if isinstance(leaf, torch.Tensor):
            on_cpu.append(leaf)
        return leaf

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        argument = next((tensor for tensor in own if tensor.raw is leaf), None)  # an operator in place returns it
        return MockTensor(leaf) if argument is None else argument

    kwargs.pop("pin_memory", None)
    plain_args = [_map(plain, value) for value in args]
    plain_kwargs = {name: _map(plain, value) for name, value in kwargs.items()}
    if own and any(tensor.dim() > 0 for tensor in on_cpu) and not op.name().startswith(MIXING):
        raise RuntimeError(f"{op.name()}: expected all tensors to be on the same device, but found {NAME} and cpu")
    with torch.inference_mode(False), torch.no_grad():  # torch wants no inference tensors for views of normal ones
        out = op(*plain_args, **plain_kwargs)
        return out if devices and devices[0].type == "cpu" else _map(wrap, out)


def _map(function: Any, value: Any) -> Any:
    """Return a value with a function applied to everything in its lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, each) for each in value)
    return function(value)


def _autocast(op: Any, *, narrow: bool) -> Any:
    """Return the autocast form of an operator: its tensors are cast to 16 bits if ``narrow``, else to float32."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST))

    def run(*args: Any, **kwargs: Any) -> Any:
        target = torch.get_autocast_dtype(NAME)
        before, after = (torch.float32, target) if narrow else (target, torch.float32)

        def cast(leaf: Any) -> Any:
            return leaf.to(after) if isinstance(leaf, torch.Tensor) and leaf.dtype == before else leaf

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(_map(cast, value) for value in args), **kwargs)

    return run
