"""Which token comes next: the likeliest, or one by chance among those that are likely enough."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepstep.core.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # the fewest tokens that together have this probability are drawn from
    seed: int = 0

    def __post_init__(self) -> None:
        """InputError for what is no temperature or probability."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"{self.temperature} is no temperature", where="temperature", next="Use 0 or more."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(
                f"{self.top_p} is no probability", where="top_p", next="Use more than 0, at most 1."
            )


class Sampler:
    """Draws for prompts by their number: what is drawn for one does not depend on which others there are."""

    def __init__(self, sampling: Sampling, prompts: Sequence[int]) -> None:
        self._sampling = sampling
        self._chance = [_generator(sampling.seed, prompt) for prompt in prompts]

    def keep(self, rows: Sequence[int]) -> None:
        self._chance = [self._chance[row] for row in rows]

    def draw(self, logits: Tensor) -> Tensor:
        """One token of each row, [rows], on the CPU; logits [rows, vocabulary] in fp32."""
        sampling = self._sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=1).cpu()
        # The greatest logit is taken off first: a small temperature must not overflow.
        odds = ((logits - logits.amax(dim=1, keepdim=True)) / sampling.temperature).softmax(dim=1)
        likely, tokens = odds.sort(dim=1, descending=True, stable=True)
        upto = likely.double().cumsum(dim=1)
        if sampling.top_p < 1:
            # A token stays while those before it have less than top_p; the first one always does.
            last = (upto - likely < sampling.top_p).sum(dim=1, keepdim=True) - 1
        else:
            last = (likely > 0).sum(dim=1, keepdim=True) - 1
        drawn = torch.stack(
            [torch.rand((), generator=chance, dtype=torch.float64) for chance in self._chance]
        )
        points = drawn.to(upto.device).unsqueeze(1) * upto.gather(1, last)
        place = torch.searchsorted(upto, points, right=True).minimum(last)
        return tokens.gather(1, place).squeeze(1).cpu()


def _generator(seed: int, prompt: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
