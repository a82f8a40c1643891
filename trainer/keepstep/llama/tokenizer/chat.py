"""Llama 3's chat format: a header with the role before each message, a mark after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepstep.core.errors import InputError
from keepstep.llama.tokenizer.protocol import Tokenizer, Tokens

BEGIN, START, END, TURN = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # system, user, assistant or tool
    text: str


def dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> Tokens:
    """The tokens after which the model answers: all messages, and the header of the answer.

    Texts are taken as they are: marks within them are text. InputError for a role that does not exist, and
    for a tokenizer without these marks.
    """
    if missing := [mark for mark in (BEGIN, START, END, TURN) if mark not in tokenizer.special]:
        raise InputError(
            f"the tokenizer {tokenizer.name} has no chat format", where="tokenizer",
            why=f"it has no token {', '.join(missing)}",
            next="Use Llama 3's tokenizer, or give the prompt as plain text.",
        )  # fmt: skip
    special = tokenizer.special
    parts = [np.array([special[BEGIN]], np.int64)]
    for message in messages:
        parts += [*_header(tokenizer, message.role), tokenizer.encode(message.text.encode())]
        parts.append(np.array([special[TURN]], np.int64))
    return np.concatenate([*parts, *_header(tokenizer, "assistant")])


def _header(tokenizer: Tokenizer, role: str) -> list[Tokens]:
    if role not in _ROLES:
        raise InputError(f"{role!r} is no role", where="messages", next=f"The roles are {', '.join(_ROLES)}.")
    return [
        np.array([tokenizer.special[START]], np.int64),
        tokenizer.encode(_ROLES[role].encode()),
        np.array([tokenizer.special[END]], np.int64),
        tokenizer.encode(b"\n\n"),
    ]
