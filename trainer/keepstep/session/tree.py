"""A script's state as bytes: nested dicts, lists and tuples of tensors and plain values.

Tensors go end to end into a payload, each at a multiple of 64 bytes; everything else, and where each tensor
lies, is the description (JSON). What JSON does not know is wrapped: {"$dict": pairs} for keys that are no
strings, {"$tuple": items}, {"$tensor": number}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keepstep.core.errors import InputError

_ALIGNMENT = 64


@dataclass(slots=True)
class Packed:
    """What is to be copied where."""

    tree: Any = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    size: int = 0  # bytes of the payload

    @classmethod
    def of(cls, state: Any) -> "Packed":
        """Errors: InputError that names what is neither a tensor nor a plain value."""
        packed = cls()
        packed.tree = packed._wrap(state, "state")
        return packed

    def describe(self, step: int) -> bytes:
        table = [
            [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset]
            for tensor, offset in zip(self.tensors, self.offsets, strict=True)
        ]
        return json.dumps({"step": step, "tensors": table, "tree": self.tree}).encode()

    def copy_into(self, target: memoryview) -> None:
        """On GPUs, too, the copy is complete when this returns."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            if tensor.numel():
                whole = torch.frombuffer(target, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                whole.view(tensor.shape).copy_(tensor.detach())

    def _wrap(self, value: Any, where: str) -> Any:
        match value:
            case torch.Tensor():
                if hasattr(value, "to_local"):  # of a DTensor this rank has its shard
                    value = value.to_local()
                self.tensors.append(value)
                self.offsets.append(self.size)
                self.size += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
                return {"$tensor": len(self.tensors) - 1}
            case dict():
                pairs = [[key, self._wrap(item, f"{where}[{key!r}]")] for key, item in value.items()]
                if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
                    return dict(pairs)
                return {"$dict": [[self._wrap(key, f"a key of {where}"), item] for key, item in pairs]}
            case tuple():
                return {"$tuple": [self._wrap(item, f"{where}[{k}]") for k, item in enumerate(value)]}
            case list():
                return [self._wrap(item, f"{where}[{k}]") for k, item in enumerate(value)]
            case None | bool() | int() | float() | str():
                return value
        raise InputError(
            f"{where} is a {type(value).__name__}", why="snapshots hold tensors and plain values",
            next="Leave it out, or turn it into numbers, strings, lists, dicts or tensors.",
        )  # fmt: skip


def unpack(description: bytes, payload: memoryview) -> tuple[int, Any]:
    """The step, and the state with tensors of its own."""
    described = json.loads(description)

    def tensor(number: int) -> torch.Tensor:
        name, shape, offset = described["tensors"][number]
        dtype: torch.dtype = getattr(torch, name)
        made = torch.empty(shape, dtype=dtype)
        if made.numel():
            made.view(-1).copy_(torch.frombuffer(payload, dtype=dtype, count=made.numel(), offset=offset))
        return made

    return int(described["step"]), _unwrap(described["tree"], tensor)


def _unwrap(value: Any, tensor: Callable[[int], torch.Tensor]) -> Any:
    match value:
        case {"$tensor": number}:
            return tensor(number)
        case {"$tuple": items}:
            return tuple(_unwrap(item, tensor) for item in items)
        case {"$dict": pairs}:
            return {_unwrap(key, tensor): _unwrap(item, tensor) for key, item in pairs}
        case dict():
            return {key: _unwrap(item, tensor) for key, item in value.items()}
        case list():
            return [_unwrap(item, tensor) for item in value]
    return value


def sharded(state: Any, like: Any) -> Any:
    """A restored state in which a rank's shards are DTensors again, laid out as those of `like` are."""
    match state, like:
        case torch.Tensor(), torch.Tensor() if hasattr(like, "to_local"):
            from torch.distributed.tensor import DTensor

            own: Any = like
            return DTensor.from_local(
                state.to(own.device), own.device_mesh, own.placements, shape=own.shape, stride=own.stride()
            )
        case dict(), dict():
            return {key: sharded(item, like.get(key)) for key, item in state.items()}
        case (list(), list()) | (tuple(), tuple()):
            return type(state)(sharded(item, own) for item, own in zip(state, like, strict=True))
    return state
