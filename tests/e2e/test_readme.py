"""What the README tells people to type works as it stands, in its order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.cli import service
from keepstep.core.home import Home

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BY_CI = {"make demo", "make test", "make check"}  # runs of their own: tests/e2e/test_demo.py and .ci/run


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].split("  #")[0].strip() for line in lines]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(path=tmp_path / "home")
    yield home
    service.stop(home, force=True)


@pytest.mark.timeout(900)
def test_the_commands_run(home: Home, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    env = {**os.environ, "KEEPSTEP_HOME": str(home.path)}
    ran = 0
    for command in commands():
        if command in BY_CI or command.startswith("git clone"):
            continue
        words = shlex.split(command)
        assert words[0] == ".venv/bin/keepstep", command
        words[0] = str(Path(sys.executable).with_name("keepstep"))
        done = subprocess.run(
            words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 8


def test_the_commands_of_the_house_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    told = [command for command in commands() if command.startswith("make ")]
    assert set(told) == BY_CI
    for command in told:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_every_file_and_option_that_it_names_exists() -> None:
    for name in re.findall(r"\]\(([A-Za-z./]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"deploy/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name
