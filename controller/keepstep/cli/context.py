"""Which controller a command talks to.

In this order: `--context NAME` or KEEPSTEP_CONTEXT, KEEPSTEP_URL with KEEPSTEP_TOKEN, the current context of
contexts.toml, and this machine's own controller, which is started if there is none. The context `local` is
always this machine's.
"""

import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepstep.cli.client import Client
from keepstep.core.errors import InputError, NotFound
from keepstep.core.home import find_home

if TYPE_CHECKING:
    import typer

LOCAL = "local"
_IDLE_EXIT_S = 1800.0  # a controller nobody asked for goes when it has had nothing to do for this long


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    name: str
    url: str
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """contexts.toml: the current one's name and all that are known."""

    current: str = ""
    known: tuple[Context, ...] = ()

    def find(self, name: str) -> Context:
        for context in self.known:
            if context.name == name:
                return context
        import difflib

        near = difflib.get_close_matches(name, [context.name for context in self.known] + [LOCAL], n=1)
        raise NotFound(
            f"there is no context {name!r}",
            where=str(contexts_file()),
            next=f"Did you mean {near[0]!r}?" if near else "`keepstep context add NAME URL` makes one.",
        )

    def with_context(self, context: Context) -> "Contexts":
        others = tuple(known for known in self.known if known.name != context.name)
        return replace(self, known=(*others, context))


def contexts_file(environ: Mapping[str, str] | None = None) -> Path:
    env = os.environ if environ is None else environ
    config = env.get("XDG_CONFIG_HOME") or ""
    base = Path(config) if config.startswith("/") else Path("~/.config").expanduser()
    return base / "keepstep" / "contexts.toml"


def load_contexts(path: Path) -> Contexts:
    try:
        document = tomllib.loads(path.read_text())
        known = tuple(
            Context(name=name, url=str(entry["url"]), token=str(entry.get("token", "")))
            for name, entry in document.get("contexts", {}).items()
        )
    except FileNotFoundError:
        return Contexts()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "this file cannot be used", where=str(path), why=str(error), next="Correct it or remove it."
        ) from error
    return Contexts(current=str(document.get("current", "")), known=known)


def save_contexts(path: Path, contexts: Contexts) -> None:
    """Write the file whole, readable by its owner only: it holds tokens."""
    lines = [f"current = {_quoted(contexts.current)}"]
    for context in contexts.known:
        lines += ["", f"[contexts.{_quoted(context.name)}]", f"url = {_quoted(context.url)}"]
        lines += [f"token = {_quoted(context.token)}"] if context.token else []
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    temporary.replace(path)


def chosen(name: str, environ: Mapping[str, str] | None = None) -> Context | None:
    """The context that option, environment and file come to; None: this machine's own controller."""
    env = os.environ if environ is None else environ
    name = name or env.get("KEEPSTEP_CONTEXT", "")
    if not name and (url := env.get("KEEPSTEP_URL")):
        return Context(name="KEEPSTEP_URL", url=url, token=env.get("KEEPSTEP_TOKEN", ""))
    contexts = load_contexts(contexts_file(env))
    name = name or contexts.current or LOCAL
    return None if name == LOCAL else contexts.find(name)


def connect(ctx: "typer.Context", *, start: bool = True) -> Client:
    """The client for a command. Starts this machine's controller when that is the one and there is none."""
    root: Any = ctx.find_root().obj or {}
    return connect_to(root.get("context", ""), start=start)


def connect_to(name: str, *, start: bool = True) -> Client:
    from keepstep.cli import service

    context = chosen(name)
    if context is not None:
        return Client(url=context.url, token=context.token, name=context.name)
    home = find_home()
    running = service.find(home)
    if running is None:
        if not start:
            raise service.not_running(home)
        running = service.start(home, service.Options(idle_exit_s=_IDLE_EXIT_S)).running
        print(f"keepstep: started a controller on this machine ({running.url}); `keepstep down` stops it",
              file=sys.stderr)  # fmt: skip
    return Client(url=running.url, token=running.token)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    import json

    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
