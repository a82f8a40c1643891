"""Who asks, and whether they may. Every route names the least role that it needs."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request

from keepstep.control.loop import Controller
from keepstep.control.requests import Principal
from keepstep.core.errors import Unauthorized
from keepstep.store.rows import Role, Token


def controller_of(request: Request) -> Controller:
    controller: Controller = request.app.state.controller
    return controller


def secret_of(header: str | None) -> str:
    """The bearer token of an Authorization header. Errors: Unauthorized."""
    scheme, _, secret = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthorized(
            "no token",
            why="every request needs `Authorization: Bearer ...`",
            next="Set KEEPSTEP_TOKEN, or add a context: keepstep context add NAME --url URL --token-file F.",
        )
    return secret


async def token_of(request: Request) -> Token:
    controller = controller_of(request)
    secret = secret_of(request.headers.get("authorization"))
    return await controller.on_store(controller.store.tokens.verify, secret)


def needs(role: Role) -> Callable[..., Awaitable[Principal]]:
    """A dependency: the caller's token has at least this role."""

    async def check(token: Annotated[Token, Depends(token_of)]) -> Principal:
        if not token.allows(role):
            has = f"role {token.role}" if token.role else f"a token of kind {token.kind}"
            raise Unauthorized(
                f"token {token.name!r} may not do this",
                why=f"it has {has}, and this needs {role}",
                next="Ask an administrator: keepstep token create NAME --role " + role + ".",
            )
        return Principal(name=token.principal or token.name, project=token.project)

    return check


Control = Annotated[Controller, Depends(controller_of)]
Viewer = Annotated[Principal, Depends(needs("viewer"))]
Submitter = Annotated[Principal, Depends(needs("submitter"))]
Operator = Annotated[Principal, Depends(needs("operator"))]
Admin = Annotated[Principal, Depends(needs("admin"))]
