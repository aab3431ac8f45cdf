"""A device that is not there: memory of the CPU that says it is elsewhere, and refuses to be mixed with the CPU's.

Inside the block a tensor made on DEVICE, moved there, or computed from such a one is a tensor of DEVICE. An operator that takes
one of each kind raises as torch does for a GPU; a copy from one to the other and numbers without dimensions are free.
Decisions: a function mode, so it sees what this thread asks of torch and not what happens inside it (autograd's own sums); the
kind of a tensor is noted on the object, so that nothing is taken for a GPU's because of an address.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("privateuseone:0")
CPU = torch.device("cpu")
MARK = "_is_pretended"
INDEXING = {
    Tensor.__getitem__,
    Tensor.__setitem__,
}  # a device's tensor takes indices of the host, not the other way round
HOST_ONLY = {Tensor.numpy, Tensor.__array__}


class PretendedDevice(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        if function == Tensor.device.__get__:
            return DEVICE if is_pretended(args[0]) else function(*args)
        if function == Tensor.is_cpu.__get__:
            return not is_pretended(args[0])
        if function is Tensor.to and isinstance(args[1], Tensor):
            args = (args[0], DEVICE if is_pretended(args[1]) else CPU, args[1].dtype)
        given = [] if function is Tensor.copy_ else list(tensors_in((args, kwargs)))
        kinds = {is_pretended(tensor) for tensor in given if tensor.ndim}
        if function in INDEXING and is_pretended(args[0]):
            kinds = {True}
        if len(kinds) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name_of(function)} got both")
        if function in HOST_ONLY and True in kinds:
            raise TypeError(f"can't convert a {DEVICE} tensor to numpy; use Tensor.cpu() first")
        wanted, args, kwargs = host_arguments(args, kwargs)
        here = wanted == DEVICE if wanted else function is not Tensor.cpu and any(map(is_pretended, given))
        result = function(*args, **kwargs)
        if function is Tensor.copy_:
            return result
        moves = function is Tensor.cpu or (wanted is not None and bool(given))
        return marked(result, here, [id(tensor) for tensor in given], moves)


def is_pretended(tensor: Tensor) -> bool:
    return MARK in tensor.__dict__


def name_of(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_in(part)


def host_arguments(args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple, dict]:
    """The device that a call asks for, and the call as the CPU understands it. `like.to(other)` asks for other's."""
    found: list[torch.device] = []

    def host(value: Any) -> Any:
        is_device = isinstance(value, torch.device) or (
            isinstance(value, str) and value in (str(DEVICE), "cpu", "meta")
        )
        if not is_device:
            return value
        found.append(torch.device(value))
        return CPU if found[-1] == DEVICE else value

    args, kwargs = tuple(map(host, args)), {key: host(value) for key, value in kwargs.items()}
    return (found[0] if found else None), args, kwargs


def marked(result: Any, here: bool, given: list[int], moves: bool) -> Any:
    """The result as one of the device (`here`) or of the CPU. What is moved is another object than it was."""
    if isinstance(result, Tensor):
        if id(result) in given:
            if not moves or is_pretended(result) == here:
                return result
            result = result.clone()
        result.__dict__.pop(MARK, None)
        if here:
            result.__dict__[MARK] = True
    elif isinstance(result, tuple | list):
        for part in result:
            marked(part, here, given, moves)
    return result
