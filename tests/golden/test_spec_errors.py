"""What people read when a spec is wrong: the whole message, to the letter.

A script holds cases: `=== what is wrong`, the YAML (with lines of --set before it, if any), `>>>>`, the
message. `pytest --golden-rewrite` writes the messages anew; a person reads the difference.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from keepstep.core.errors import InputError
from keepstep.spec import check

FOLDER = Path(__file__).parent / "spec_errors"
CASE, ANSWER, SET = "=== ", ">>>>", "--set "


@dataclass(frozen=True)
class Case:
    title: str
    text: str  # as it stands in the script
    answer: str

    def outcome(self) -> str:
        lines = self.text.splitlines(keepends=True)
        overrides = [line.removeprefix(SET).rstrip("\n") for line in lines if line.startswith(SET)]
        spec = "".join(line for line in lines if not line.startswith(SET))
        try:
            checked = check(spec, "job.yaml", overrides, base_dir=Path("/work"))
        except InputError as error:
            return str(error)
        return "\n".join([f"ok: {checked.summary}", *(f"warning: {each}" for each in checked.warnings)])


def cases_of(script: str) -> tuple[str, list[Case]]:
    """What stands before the first case, and the cases."""
    head, *blocks = ("\n" + script).split("\n" + CASE)
    cases = []
    for block in blocks:
        title, _, rest = block.partition("\n")
        text, _, answer = rest.partition(ANSWER + "\n")
        cases.append(Case(title, text, answer.strip("\n")))
    return head.strip("\n"), cases


def scripts() -> list[Path]:
    return sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_messages(script: Path, golden_rewrite: bool) -> None:
    head, cases = cases_of(script.read_text())
    assert cases, f"{script} holds no case"
    came_out = [Case(case.title, case.text, case.outcome()) for case in cases]
    if golden_rewrite:
        blocks = [f"{CASE}{case.title}\n{case.text}{ANSWER}\n{case.answer}\n" for case in came_out]
        script.write_text(head + "\n\n" + "\n".join(blocks))
        return
    for case, expected in zip(came_out, cases, strict=True):
        assert case.answer == expected.answer, case.title


def test_the_scripts_are_found() -> None:
    assert len(scripts()) >= 5
