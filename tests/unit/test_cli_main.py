"""What the command line does before any controller is asked: help, codes, complaints, and what it imports."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer import Context

from keepstep.cli import catalogue
from keepstep.cli.lazy import root_command
from keepstep.cli.main import outcome
from keepstep.core import errors

HEAVY = ("torch", "ray", "kubernetes", "sqlalchemy", "fastapi", "pydantic", "httpx", "rich", "yaml", "numpy")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No controller of the person who runs the tests, and none to be started."""
    for name in ("KEEPSTEP_CONTEXT", "KEEPSTEP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEEPSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("KEEPSTEP_URL", "http://127.0.0.1:9")  # nobody listens on the discard port


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, env=os.environ
    )


def imported_by(*arguments: str) -> set[str]:
    code = (
        "import json, sys\n"
        "from keepstep.cli.main import outcome\n"
        f"outcome({list(arguments)!r})\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))"
    )
    return set(json.loads(run_python(code).stdout.splitlines()[-1]))


def test_help_names_every_command_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["--help"]) == 0
    shown = capsys.readouterr().out
    for entry in catalogue.entries():
        assert f"  {entry.name:<12}{entry.summary}" in shown
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130):
        assert f"\n  {code:>3}  " in shown


def test_every_error_has_a_listed_exit_code() -> None:
    listed = dict(catalogue.exit_codes())
    kinds = (errors.InputError, errors.NotFound, errors.Refused, errors.Unreachable, errors.TimedOut,
             errors.JobFailed)  # fmt: skip
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5, 6, 7]
    assert {kind.exit_code for kind in kinds} <= set(listed)


def test_without_a_command_help_is_shown_and_the_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome([]) == 2
    assert "Jobs:" in capsys.readouterr().out


@pytest.mark.parametrize("entry", list(catalogue.entries()), ids=lambda entry: entry.name)
def test_every_command_exists_and_has_help(
    entry: catalogue.Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    if entry.module in {"processes", "trainer"} and entry.name != "controller":
        pytest.skip("parses its own options")
    assert outcome([entry.name, "--help"]) == 0
    assert f"Usage: keepstep {entry.name}" in capsys.readouterr().out


def test_help_imports_next_to_nothing() -> None:
    assert not imported_by("--help") & {*HEAVY, "typer", "subprocess", "json5"}


def test_list_imports_nothing_heavy() -> None:
    assert not imported_by("list") & set(HEAVY)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lst", "list"), ("ps", "list"), ("kill", "cancel"), ("subimt", "submit"), ("torchrun", "run")],
)
def test_did_you_mean(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome([typed]) == 2
    assert f"Did you mean `keepstep {meant}`?" in capsys.readouterr().err


def test_an_unknown_option_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["list", "--bogus"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "--bogus" in told.err
    assert "keepstep list --help" in told.err
    assert "Traceback" not in told.err


def test_a_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["list", "--limit", "many"]) == 2
    assert "'many' is not a whole number" in capsys.readouterr().err


def test_an_output_that_does_not_exist_is_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outcome(["list", "-o", "jsn"]) == 2
    assert "Did you mean json?" in capsys.readouterr().err


def test_a_state_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["list", "--state", "runing"]) == 2
    assert "Did you mean running?" in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["list"]) == 5
    told = capsys.readouterr()
    assert told.out == ""
    assert "cannot be reached" in told.err


def test_cancel_needs_yes_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepstep.cli.options import confirm

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(errors.InputError, match="Nobody can be asked"):
        confirm("End it?", yes=False)
    confirm("End it?", yes=True)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = (
        "import os, sys\n"
        "from keepstep.cli.main import main\n"
        "reading, writing = os.pipe()\n"
        "os.close(reading)\n"
        "os.dup2(writing, 1)\n"
        "main(['--help'])\n"
    )
    ended = run_python(code)
    assert ended.returncode == 0
    assert ended.stderr == ""


def test_completion_offers_commands_without_importing_them() -> None:
    env = {
        **os.environ, "_KEEPSTEP_COMPLETE": "complete_bash", "COMP_WORDS": "keepstep su", "COMP_CWORD": "1",
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "keepstep.cli.main"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=60,
    )
    assert ended.stdout.split() == ["submit", "suspend"]


def test_the_tree_of_commands_is_whole() -> None:
    root = root_command()
    for group in ("node", "token", "context", "spec"):
        found = root.get_command(Context(root, help_option_names=["--help"]), group)
        assert found.commands, group
