"""Where a cold store has its class from: torch's library alone if that will do, else all of torch.

In interpreters of their own, since what is imported once stays. Packages stand in for builds of torch that
this machine does not have; tests/integration/test_shim.py has stores of the real one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.agent.rank import rendezvous

AGENTS = Path(rendezvous.__file__).parents[3]
ASKED = "from keepstep.agent.rank.rendezvous import tcp_store; print(tcp_store().of)"
WHOLE = "class TCPStore: of = 'all of torch'"
LIBRARY = """
import sys, types
def _c10d_init():
    import torch.distributed  # as the real one does
    made = sys.modules["torch._C._distributed_c10d"] = types.ModuleType("torch._C._distributed_c10d")
    made.TCPStore = type("TCPStore", (), {"of": "the library"})
"""


def asked(folder: Path, library: str | None) -> "subprocess.CompletedProcess[str]":
    """In an interpreter whose torch has this library; None: it has no torch."""
    if library is not None:
        (folder / "torch" / "distributed").mkdir(parents=True)
        (folder / "torch" / "__init__.py").write_text("import torch._C")
        (folder / "torch" / "distributed" / "__init__.py").write_text(WHOLE)
        (folder / "torch" / "_C.py").write_text(library)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, AGENTS)))}
    return subprocess.run(
        [sys.executable, "-S", "-c", ASKED], env=environment, cwd=folder, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("library", "of"),
    [
        (LIBRARY, "the library"),
        ("def _c10d_init():\n    import torch.distributed as d\n    d.needed", "all of torch"),
        ("", "all of torch"),
        (
            "import sys\nif not hasattr(sys.modules['torch'], '__file__'): raise ImportError('libcudart.so')",
            "all of torch",
        ),
    ],
    ids=["by itself", "needs more of torch", "is cut otherwise", "needs other libraries first"],
)
def test_the_library_alone_if_that_will_do(tmp_path: Path, library: str, of: str) -> None:
    done = asked(tmp_path, library)
    assert (done.stdout, done.stderr) == (f"{of}\n", "")


def test_no_torch_is_no_store(tmp_path: Path) -> None:
    done = asked(tmp_path, None)
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr
