"""Run by path, under any interpreter: `python .../rank/__main__.py shim|standby|store ...`.

Loads this folder as a package of a private name, takes it off sys.path again, and hands over.
"""

import importlib.util
import os
import sys


def _load() -> None:
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is loaded later
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]  # noqa: PTH100
    spec = importlib.util.spec_from_file_location(
        "_keepstep_rank", f"{here}/__init__.py", submodule_search_locations=[here]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["_keepstep_rank"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _load()
    importlib.import_module("_keepstep_rank.entry").main(sys.argv[1:])
