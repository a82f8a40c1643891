"""From prompts to answers, a token of each at a time; rows that have ended leave the batch."""

import codecs
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from keepstep.llama.generation.decoder import Decoder
from keepstep.llama.generation.sampling import Sampler, Sampling
from keepstep.llama.tokenizer import Tokenizer

Ending = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of a prompt's answer."""

    prompt: int  # by its number
    token: int
    ended: Ending | None  # stop: it is a stop token; length: as many as were asked for; context: no room


def generate(
    model: Decoder,
    prompts: Sequence[Tensor],
    *,
    most: int,
    sampling: Sampling,
    stops: Set[int] = frozenset(),
    first: int = 0,
) -> Iterator[Token]:
    """Tokens as they come, those of all prompts [tokens] in turn; at most `most` of each.

    `first` is the number of the first prompt: chance depends on it. InputError for prompts that do not fit.
    """
    numbers = list(range(first, first + len(prompts)))
    counts = [len(prompt) for prompt in prompts]
    cache, sampler = model.cache(len(prompts)), Sampler(sampling, numbers)
    logits = model.read(prompts, cache)
    for said in range(1, most + 1):
        tokens = sampler.draw(logits)
        alive: list[int] = []
        for row, token in enumerate(tokens.tolist()):
            ended: Ending | None = None
            if token in stops:
                ended = "stop"
            elif said == most:
                ended = "length"
            elif counts[row] + said >= model.shape.max_seq:
                ended = "context"
            yield Token(numbers[row], token, ended)
            if ended is None:
                alive.append(row)
        if not alive:
            return
        if len(alive) < len(numbers):
            rows = torch.tensor(alive)
            cache.keep(rows.to(model.device))
            sampler.keep(alive)
            tokens = tokens[rows]
            numbers, counts = [numbers[row] for row in alive], [counts[row] for row in alive]
        logits = model.step(tokens, cache)


@dataclass(slots=True)
class Answer:
    """What is known of an answer; `fresh` is the text that came with the last token."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    fresh: str = ""
    ended: Ending | None = None


def answers(stream: Iterator[Token], tokenizer: Tokenizer) -> Iterator[Answer]:
    """The answer that each token belongs to, with its text so far; a stop token has none.

    A character whose bytes are several tokens comes with the last of them.
    """
    known: dict[int, tuple[Answer, codecs.IncrementalDecoder]] = {}
    for one in stream:
        if one.prompt not in known:
            known[one.prompt] = Answer(one.prompt), codecs.getincrementaldecoder("utf-8")("replace")
        answer, decoder = known[one.prompt]
        said = b"" if one.ended == "stop" else tokenizer.raw(np.array([one.token]))
        answer.tokens.append(one.token)
        answer.fresh = decoder.decode(said, final=one.ended is not None)
        answer.text += answer.fresh
        answer.ended = one.ended
        yield answer
        if one.ended is not None:
            del known[one.prompt]
