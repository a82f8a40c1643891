"""What a script imports and sets in its environment, told by a warm rank for the next standby.

Told after optimizer steps 1, 10, 100 and 1000 (a rank that is killed has told enough by then) and at the
script's end, into one small file of the launch directory. Only modules of site-packages: what lies elsewhere
may be the user's own and change. A rank that cannot tell goes on all the same.
"""

import json
import os
import site
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

LEARNT = "learnt-{rank}.json"
_STEPS, _LAST_STEP = {1, 10, 100, 1000}, 1000


class Account:
    """`env`: as the script found it. `before`: the modules that were loaded."""

    def __init__(self, file: Path, env: Mapping[str, str], before: Set[str]) -> None:
        self._file, self._env, self._before = file, env, before
        self._owner, self._last = os.getpid(), next(reversed(sys.modules))
        self._folders = tuple(f"{folder}{os.sep}" for folder in _site_folders())
        self._told: Any = None
        self._steps = 0
        self._hook: Any = None

    def watch(self) -> None:
        """Tell by itself as steps are made. Needs a torch that is loaded already."""
        optimizers = sys.modules.get("torch.optim.optimizer")
        if optimizers is not None:
            self._hook = optimizers.register_optimizer_step_post_hook(self._stepped)

    def tell(self) -> None:
        if os.getpid() != self._owner:  # a child of the script came by
            return
        found = {"modules": list(self._imported()), "sets": sorted(self._set())}
        if found == self._told:
            return
        draft = self._file.with_suffix(".new")
        with suppress(OSError):
            draft.write_text(json.dumps(found))
            draft.replace(self._file)
        self._told = found

    def _stepped(self, *_: object) -> None:
        self._steps += 1
        if self._steps in _STEPS:
            self.tell()
        if self._steps >= _LAST_STEP and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _imported(self) -> Iterator[str]:
        for name in self._since():
            spec: Any = getattr(sys.modules.get(name), "__spec__", None)
            file = getattr(spec, "origin", None)
            if isinstance(file, str) and file.startswith(self._folders) and spec.name == name:
                yield name

    def _since(self) -> list[str]:
        """Newest last. What was there before is not even looked at: that would copy its pages."""
        found = []
        with suppress(RuntimeError):  # another thread imports: what is missing is told the next time
            for name in reversed(sys.modules):
                if name == self._last:
                    break
                if name not in self._before:
                    found.append(name)
        return found[::-1]

    def _set(self) -> Iterator[str]:
        """Names only: values may be secrets."""
        now = dict(os.environ)
        return (name for name in now.keys() | self._env.keys() if now.get(name) != self._env.get(name))


def _site_folders() -> list[str]:
    return [*site.getsitepackages(), site.getusersitepackages()]
