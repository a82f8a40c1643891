"""Lets the ranks of validations fall sick as SICKNESS says: see tests/sickness.py, which must be in reach."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

RUN = "keepstep.validate.run"


class Finder:
    """Lets the module be found as usual, and makes the device sick when it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != RUN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            from sickness import fall_sick

            execute(module)
            fall_sick()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
