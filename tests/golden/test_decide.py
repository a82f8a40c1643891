"""Scenarios as readable text: what is seen, and what is decided with its reasons (see decide_script)."""

from pathlib import Path

import pytest

from golden.decide_script import Scene

FOLDER = Path(__file__).parent / "decide"
SCRIPTS = sorted(FOLDER.glob("*.txt"))
SCENE = "=== "  # a title; everything said before it is forgotten


def played(script: str) -> str:
    """The script with the answers that come out."""
    scene, lines = Scene(), []
    for line in script.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if line.startswith(SCENE):
            scene = Scene()
        elif line and not line.startswith("#"):
            lines += [f"    {answer}" for answer in scene.run(line)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_decisions(script: Path, golden_rewrite: bool) -> None:
    expected = script.read_text()
    came_out = played(expected)
    if golden_rewrite:
        script.write_text(came_out)
        return
    assert came_out == expected


def test_every_line_of_a_script_is_understood() -> None:
    assert SCRIPTS, "no scripts"
    with pytest.raises(AttributeError):
        played("nodes a b\n")
