"""What the pieces of messages have in common."""

import msgspec


class Part(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A piece of a message."""
