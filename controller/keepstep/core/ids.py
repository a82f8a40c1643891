"""Names and numbers, so that a rank is not taken for a step by accident."""

import random
from typing import NewType

JobId = NewType("JobId", str)  # "llama3-8b-k3f9": the name and four letters, unique in a store
Node = NewType("Node", str)
Rank = NewType("Rank", int)  # global, 0-based
Step = NewType("Step", int)  # completed optimizer steps: 0 before the first one
Attempt = NewType("Attempt", int)  # 1-based, for the job
Incarnation = NewType("Incarnation", int)  # 1-based, for a cell within an attempt
Term = NewType("Term", int)  # of a controller, granted by the store

_LETTERS = "bcdfghjkmnpqrstvwxz23456789"  # no vowels, nothing that looks like something else


def short(source: random.Random, length: int = 4) -> str:
    """A short identifier that is easy to read out; uniqueness is the store's to check."""
    return "".join(source.choice(_LETTERS) for _ in range(length))
