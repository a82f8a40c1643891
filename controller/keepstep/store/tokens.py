"""Credentials: people's, with a role; nodes', bound to one name; and those that a node joins with.

A secret is 256 random bits, so its SHA-256 is all that is kept, and finding the row by it compares nothing
that can be learnt by timing. Last uses are gathered and written with the next beat of the lease.
"""

import hashlib
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from keepstep.core.clock import Clock
from keepstep.core.errors import InputError, NotFound, Refused, Unauthorized
from keepstep.core.ids import Node
from keepstep.store import tables
from keepstep.store.rows import ROLES, Issued, Lease, Role, Token, TokenKind

_TABLE = tables.tokens
_COLUMNS = [c for c in _TABLE.c if c.name != "hash"]
_PREFIX: dict[TokenKind, str] = {"user": "ks_", "join": "ks_join_", "agent": "ks_agent_"}
_LIST_MAX = 1000

_Found = list[Token]  # where the method `list` hides the type


class Tokens:
    def __init__(
        self,
        reading: Callable[[], AbstractContextManager[sa.Connection]],
        transaction: Callable[[], AbstractContextManager[tuple[sa.Connection, Lease]]],
        clock: Clock,
    ) -> None:
        self._reading = reading
        self._transaction = transaction
        self._clock = clock
        self._used: dict[int, float] = {}  # token -> when

    def issue(
        self,
        *,
        name: str,
        role: Role | None = None,
        kind: TokenKind = "user",
        principal: str = "",
        project: str = "default",
        node: str | None = None,
        ttl_s: float | None = None,
        uses: int | None = None,
        replace: bool = False,
    ) -> Issued:
        """A new credential; its secret is shown this once. `replace` revokes the live ones of its name."""
        match kind:
            case "user" if role not in ROLES:
                raise InputError(f"no role {role}", next=f"The roles are {', '.join(ROLES)}.")
            case "agent" if not node:
                raise InputError("an agent's token names its node")
            case _:
                pass
        with self._transaction() as (connection, _):
            if replace:
                self._revoke(connection, sa.and_(_TABLE.c.name == name, _TABLE.c.kind == kind))
            row = {
                "name": name,
                "kind": kind,
                "role": role if kind == "user" else None,
                "node": node if kind == "agent" else None,
                "principal": principal or name,
                "project": project,
                "expires_at": None if ttl_s is None else self._clock.wall() + ttl_s,
                "uses_left": uses if kind == "join" else None,
            }
            return self._insert(connection, row)

    def verify(self, secret: str) -> Token:
        """The live token of a secret; Unauthorized otherwise, and no word on which of the reasons it was."""
        with self._reading() as connection:
            token = self._live(connection, secret)
        self._used[token.id] = self._clock.wall()
        return token

    def join(self, secret: str, node: str, *, replace: bool = False) -> Issued:
        """A node's own credential for a join token, one use of which it costs.

        Refused while the node has a live credential: a join token must not be enough to become another node.
        """
        mine = sa.and_(_TABLE.c.kind == "agent", _TABLE.c.node == node)
        with self._transaction() as (connection, _):
            token = self._live(connection, secret)
            if token.kind != "join":
                raise Unauthorized("this token does not let a node join", next="`keepstep token` issues one.")
            if replace:
                self._revoke(connection, mine)
            elif self._find(connection, sa.and_(mine, self._is_live())):
                raise Refused(
                    f"node {node} has joined already",
                    next=f"If its credential is lost: `keepstep token revoke node/{node}`, and join again.",
                )
            of_token = _TABLE.c.id == token.id
            values = {"uses_left": _TABLE.c.uses_left - 1, "last_used_at": self._clock.wall()}
            connection.execute(sa.update(_TABLE).where(of_token).values(values))
            row = {
                "name": f"node/{node}",
                "kind": "agent",
                "node": Node(node),
                "principal": f"node/{node}",
                "project": token.project,
            }
            return self._insert(connection, row)

    def revoke(self, ref: str) -> _Found:
        """Revokes the live token of an id, or all of a name."""
        which = _TABLE.c.id == int(ref) if ref.isdecimal() else _TABLE.c.name == ref
        with self._transaction() as (connection, _):
            found = self._revoke(connection, which)
        if not found:
            raise NotFound(f"no live token {ref}", next="`keepstep token list` shows them.")
        return found

    def list(self, *, all: bool = False) -> _Found:  # noqa: A002 - also those that are no longer valid
        """The live tokens, or all, newest last."""
        with self._reading() as connection:
            return self._find(connection, sa.true() if all else self._is_live())

    def write_last_use(self, connection: sa.Connection) -> None:
        """Writes what `verify` has gathered, inside a write that is made anyway."""
        used, self._used = self._used, {}
        for token, at in used.items():
            connection.execute(sa.update(_TABLE).where(_TABLE.c.id == token).values(last_used_at=at))

    def _live(self, connection: sa.Connection, secret: str) -> Token:
        found = self._find(connection, sa.and_(_TABLE.c.hash == _hash(secret), self._is_live()))
        if not found:
            raise Unauthorized(
                "this token is not valid",
                why="it is unknown, revoked, expired or used up",
                next="`keepstep token issue` makes a new one.",
            )
        return found[0]

    def _is_live(self) -> sa.ColumnElement[bool]:
        now = self._clock.wall()
        return sa.and_(
            _TABLE.c.revoked_at.is_(None),
            sa.or_(_TABLE.c.expires_at.is_(None), _TABLE.c.expires_at > now),
            sa.or_(_TABLE.c.uses_left.is_(None), _TABLE.c.uses_left > 0),
        )

    def _find(self, connection: sa.Connection, where: sa.ColumnElement[bool]) -> _Found:
        query = sa.select(*_COLUMNS).where(where).order_by(_TABLE.c.id).limit(_LIST_MAX)
        return [Token(**row) for row in connection.execute(query).mappings()]

    def _revoke(self, connection: sa.Connection, which: sa.ColumnElement[bool]) -> _Found:
        live = self._find(connection, sa.and_(which, self._is_live()))
        ids = _TABLE.c.id.in_([token.id for token in live])
        connection.execute(sa.update(_TABLE).where(ids).values(revoked_at=self._clock.wall()))
        return live

    def _insert(self, connection: sa.Connection, row: dict[str, Any]) -> Issued:
        kind: TokenKind = row["kind"]
        secret = _PREFIX[kind] + secrets.token_urlsafe(32)
        row |= {"hash": _hash(secret), "created_at": self._clock.wall()}
        new = connection.execute(sa.insert(_TABLE).values(row)).inserted_primary_key
        assert new is not None
        return Issued(secret=secret, token=self._find(connection, _TABLE.c.id == new[0])[0])


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
