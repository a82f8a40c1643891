"""The states of a process's random number generators, as plain values and tensors."""

import random
import sys
from typing import Any

import torch


def captured() -> dict[str, Any]:
    """Of Python, of NumPy where the script has it, of PyTorch on the CPU and on every GPU."""
    numpy = sys.modules.get("numpy")
    found: dict[str, Any] = {"python": random.getstate(), "cpu": torch.random.get_rng_state()}
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy"] = (name, [int(key) for key in keys], *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def native(found: dict[str, Any]) -> dict[str, Any]:
    """As each generator's own setter wants it."""
    made = dict(found)
    if "numpy" in made:
        import numpy as np

        name, keys, *rest = made["numpy"]
        made["numpy"] = (name, np.array(keys, dtype=np.uint32), *rest)
    return made


def put_back(found: dict[str, Any]) -> None:
    states = native(found)
    random.setstate(states["python"])
    torch.random.set_rng_state(states["cpu"])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
