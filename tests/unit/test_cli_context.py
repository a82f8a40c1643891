"""Which controller is talked to."""

import stat
from pathlib import Path

import pytest

from keepstep.cli.context import Context, Contexts, chosen, contexts_file, load_contexts, save_contexts
from keepstep.core.errors import InputError, NotFound

T = "ks_of_a_test"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def write(environ: dict[str, str], current: str = "") -> None:
    known = (Context(name="prod", url="https://prod", token=T), Context(name="lab", url="http://lab"))
    save_contexts(contexts_file(environ), Contexts(current=current, known=known))


def test_nothing_set_means_this_machine(environ: dict[str, str]) -> None:
    assert chosen("", environ) is None


def test_the_order(environ: dict[str, str]) -> None:
    write(environ, current="prod")
    named = chosen("", environ)
    assert named is not None
    assert named.name == "prod"
    environ |= {"KEEPSTEP_URL": "http://other", "KEEPSTEP_TOKEN": T}
    assert chosen("", environ) == Context(name="KEEPSTEP_URL", url="http://other", token=T)
    environ["KEEPSTEP_CONTEXT"] = "lab"
    assert chosen("", environ) == Context(name="lab", url="http://lab")
    assert chosen("prod", environ) == Context(name="prod", url="https://prod", token=T)
    assert chosen("local", environ) is None


def test_a_name_that_is_not_there(environ: dict[str, str]) -> None:
    write(environ)
    with pytest.raises(NotFound) as caught:
        chosen("prd", environ)
    assert "Did you mean 'prod'?" in str(caught.value)


def test_what_is_written_is_read_and_is_its_owners_alone(environ: dict[str, str]) -> None:
    path = contexts_file(environ)
    contexts = Contexts(
        current='odd "name"\\', known=(Context(name='odd "name"\\', url="http://ü", token=f"{T}\t\x7f"),)
    )
    save_contexts(path, contexts)
    assert load_contexts(path) == contexts
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["x = ", "contexts = 3", "[contexts.a]\ntoken = 't'"])
def test_a_broken_file_is_named(environ: dict[str, str], text: str) -> None:
    path = contexts_file(environ)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_contexts(path)
    assert caught.value.where == str(path)
