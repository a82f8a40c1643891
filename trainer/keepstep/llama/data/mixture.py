"""Which source each sample comes from: exactly in proportion in every block, shuffled by the seed within it.

How many samples of a source come before any number is arithmetic, so a restart finds its place in each of
them without a state, and tokens per source are known exactly.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from keepstep.core.errors import InputError
from keepstep.llama.data.packing import permutation

BLOCK = 4096  # samples; a weight is rounded to a multiple of its reciprocal
_PURPOSE = 2  # epochs use 0 and 1


class Mixture:
    def __init__(self, shares: Sequence[int], seed: int) -> None:
        """`shares` of BLOCK, as `shares_of` gives them."""
        assert sum(shares) == BLOCK, shares
        self.shares = np.array(shares, np.int64)
        self._seed = seed
        self._in_order = np.repeat(np.arange(len(shares)), self.shares)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def at(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many of that source come before it."""
        block, place = divmod(sample, BLOCK)
        order = self._order(block)
        source = int(order[place])
        before = int((order[:place] == source).sum())
        return source, block * int(self.shares[source]) + before

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples come from each source."""
        block, place = divmod(samples, BLOCK)
        within = np.bincount(self._order(block)[:place], minlength=len(self.shares))
        counted: list[int] = (block * self.shares + within).tolist()
        return counted

    def _shuffled(self, block: int) -> NDArray[np.int64]:
        return self._in_order[permutation(BLOCK, self._seed, block, _PURPOSE)]


def shares_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as parts of BLOCK, by largest remainders, none less than one. InputError for a bad weight."""
    bad = [name for name, weight in weights.items() if not 0 < weight < float("inf")]
    if bad or not 0 < len(weights) <= BLOCK:
        raise InputError(
            f"the weight of {', '.join(bad) or 'so many sources'} cannot be used", where="data.weights",
            next="Weights are more than 0, in any unit; leave a source out that should not be used.",
        )  # fmt: skip
    total = sum(weights.values())
    exact = {name: BLOCK * weight / total for name, weight in weights.items()}
    shares = {name: max(1, int(value)) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for k in range(BLOCK - sum(shares.values())):
        shares[by_remainder[k % len(shares)]] += 1
    while (over := sum(shares.values()) - BLOCK) > 0:  # many that were raised to one: the largest gives way
        largest = max(shares, key=lambda name: shares[name])
        shares[largest] -= min(over, shares[largest] - 1)
    return shares
