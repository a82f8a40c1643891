"""Weights as Meta publishes them: params.json, and consolidated.NN.pth for each tensor parallel rank.

A matrix is cut over the files as over ranks (flat.py: the same dimensions). wq and wk have rotary pairs side
by side, ours in the two halves of a head, so their rows change places:

    theirs    a0 b0 a1 b1 a2 b2        ours    a0 a1 a2 b0 b1 b2
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.llama.flat import tp_dim
from keepstep.llama.shape import ModelShape, RopeScaling
from keepstep.llama.weights.part import Part

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_POSITIONS, _SCALED_POSITIONS = 8192, 131_072  # of Llama 3 and 3.1; the format does not say
_SMALLEST_OF_3_1 = 4096  # dim


class MetaSource:
    def __init__(self, folder: Path, params: Mapping[str, Any]) -> None:
        self._folder = folder
        found = {int(match[1]): p for p in folder.iterdir() if (match := _FILE.fullmatch(p.name))}
        if not found or sorted(found) != list(range(len(found))):
            raise self._unusable(
                f"it has the files {', '.join(p.name for _, p in sorted(found.items())) or 'none'}"
                ", and each from consolidated.00.pth on is needed"
            )
        self._paths = [path for _, path in sorted(found.items())]
        self.shape = self._shape(params)
        self._sizes = dict(self.shape.sizes())

    def fill(self, parts: Sequence[Part]) -> None:
        for part in parts:
            tensors = self._tensors(part.name)
            rows = torch.arange(part.offset[0], part.offset[0] + part.out.shape[0])
            if part.name.endswith(("wq.weight", "wk.weight")):
                rows = self._their_rows(rows)
            if tp_dim(part.name) == 0:
                self._by_rows(tensors, rows, part)
            elif tp_dim(part.name) == 1:
                self._by_columns(tensors, rows, part)
            else:
                part.out.copy_(tensors[0][rows])

    def _by_rows(self, tensors: Sequence[Tensor], rows: Tensor, part: Part) -> None:
        columns = slice(part.offset[1], part.offset[1] + part.out.shape[1])
        height = tensors[0].shape[0]
        for number, tensor in enumerate(tensors):
            here = rows // height == number
            if bool(here.any()):
                part.out[here] = tensor[rows[here] - number * height, columns].to(part.out.dtype)

    def _by_columns(self, tensors: Sequence[Tensor], rows: Tensor, part: Part) -> None:
        first, last = part.offset[1], part.offset[1] + part.out.shape[1]
        width = tensors[0].shape[1]
        for number, tensor in enumerate(tensors):
            begin, end = max(first, number * width), min(last, (number + 1) * width)
            if begin < end:
                own = slice(begin - number * width, end - number * width)
                part.out[:, begin - first : end - first] = tensor[rows[0] : rows[-1] + 1, own].to(
                    part.out.dtype
                )

    def _their_rows(self, rows: Tensor) -> Tensor:
        half = self.shape.head_dim // 2
        head, within = rows // (2 * half), rows % (2 * half)
        return 2 * half * head + 2 * (within % half) + within // half

    def _tensors(self, name: str) -> list[Tensor]:
        """A parameter's part in each file. InputError unless together they are what it should be."""
        theirs = "tok_embeddings.weight" if name == "embedding.weight" else name
        if missing := [
            p.name for p, file in zip(self._paths, self._files, strict=True) if theirs not in file
        ]:
            raise self._unusable(f"{theirs} is not in {', '.join(missing)}")
        parts: list[Tensor] = [file[theirs] for file in self._files]
        dim = tp_dim(name)
        expected = list(self._sizes[name])
        if dim is not None:
            expected[dim] //= len(parts)
        for path, part in zip(self._paths, parts, strict=True):
            if list(part.shape) != expected:
                raise self._unusable(
                    f"{theirs} has shape {list(part.shape)} in {path.name} instead of {expected}"
                )
        return parts

    @cached_property
    def _files(self) -> list[Mapping[str, Tensor]]:
        """Mapped, not read."""
        try:
            return [torch.load(p, map_location="cpu", mmap=True, weights_only=True) for p in self._paths]
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise self._unusable(str(error).partition("\n")[0]) from error

    def _shape(self, params: Mapping[str, Any]) -> ModelShape:
        scaling = self._scaling(params) if params.get("use_scaled_rope") else None
        try:
            first = self._files[0]
            return ModelShape(
                layers=params["n_layers"], dim=params["dim"],
                ffn_dim=first["layers.0.feed_forward.w1.weight"].shape[0] * len(self._paths),
                heads=params["n_heads"], kv_heads=params.get("n_kv_heads") or params["n_heads"],
                vocabulary=first["tok_embeddings.weight"].shape[0] * len(self._paths),
                max_seq=_SCALED_POSITIONS if scaling else _POSITIONS,
                rope_theta=float(params.get("rope_theta", 10_000.0)), norm_eps=params.get("norm_eps", 1e-5),
                rope_scaling=scaling,
            )  # fmt: skip
        except KeyError as error:
            raise self._unusable(f"{PARAMS} or the first file has no {error}") from error

    def _scaling(self, params: Mapping[str, Any]) -> RopeScaling:
        """By 8, as their program has it for Llama 3.1; the small models of 3.2 had another factor."""
        factor = params.get("rope_scaling_factor")
        if factor is None and params["dim"] < _SMALLEST_OF_3_1:
            raise self._unusable(
                f"{PARAMS} has no rope_scaling_factor, so it does not say how rotary positions are scaled"
            )
        return RopeScaling(
            factor=float(factor or 8), low_freq_factor=1.0,
            high_freq_factor=float(params.get("rope_high_freq_factor") or 4),
            original_max_position_embeddings=_POSITIONS,
        )  # fmt: skip

    def _unusable(self, why: str) -> InputError:
        return InputError(
            "no weights in Meta's format", where=str(self._folder), why=why,
            next=f"Name a folder with {PARAMS} and all consolidated.NN.pth of a Llama 3 model.",
        )  # fmt: skip
