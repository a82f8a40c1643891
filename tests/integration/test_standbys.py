"""The node's standby servers: what they learn of scripts, who shares one, and what they may hold."""

import asyncio
import sys
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keepstep.agent import learnt, setting
from keepstep.agent.folder import Folder
from keepstep.agent.learnt import Known
from keepstep.agent.preparation import Recipe
from keepstep.agent.rank.preload import Wanted
from keepstep.agent.standbys import Standbys
from keepstep.core.job import CommandRun
from shims import ENV, WITHIN_S, alive, launch_file, launched, said, until

CALM = """
import os
mode = os.environ.get("CALM_MODE", "none")
from calm import {parts}
"""
THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
SCRIPT = """
import sys
print("ahead" if "calm" in sys.modules else "not ahead", "CALM_MODE" in __import__("os").environ)
{before}
import calm
{after}
print(calm.mode)
"""


class Node:
    """A node's servers, with packages in a site folder of their own."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        base = folder / "base"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = base / "lib" / version / "site-packages"
        self.env = {**ENV, "PYTHONUSERBASE": str(base), "PYTHONPATH": str(self.site)}
        self.folder = Folder(folder / "agent")
        self.folder.make()
        self.events: list[tuple[str, str]] = []
        self.standbys = Standbys(
            self.folder, changed=lambda: None, tell=lambda kind, _, text: self.events.append((kind, text)),
            linger_s=options.get("linger_s", 60), bytes_max=options.get("bytes_max"),
        )  # fmt: skip
        self.attempts = 0
        parts = [f"part{n}" for n in range(learnt.WORTH_MODULES)]
        for part in parts:
            self.package(f"calm/{part}.py", "")
        self.package("calm/__init__.py", CALM.format(parts=", ".join(parts)))

    def package(self, name: str, text: str) -> None:
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def recipe(self, text: str) -> Recipe:
        """As `preparation.recipe` makes it, without torch."""
        script = self.work / "script.py"
        script.write_text(text)
        settings = setting.settings_of(script, self.env)
        made = Recipe(
            run=CommandRun(command=("python", "script.py"), workdir=str(self.work)),
            interpreter=(sys.executable,), argv=("script.py",), python=True, env=self.env, cwd=self.work,
            modules=("json",), script=learnt.digest((sys.executable,), ("script.py",), text.encode()),
            early=settings.early, late=frozenset(settings.late),
        )  # fmt: skip
        return self.standbys.informed(made)

    async def run(self, text: str, job: str = "job") -> tuple[bool, list[str], str]:
        """Whether it was warm, what it said, and why it was cold."""
        made = self.recipe(text)
        server, _ = await self.standbys.ready(job, made)
        self.attempts += 1
        directory = self.folder.path / str(self.attempts)
        file = launch_file(self.work, ("script.py",), warm=True, env=made.standby_env, early=dict(made.early))
        async with launched(directory, replace(file, attempt=self.attempts), standby=server) as shim:
            warm, note = shim.status.warm, shim.status.note
            await shim.ended(timeout_s=WITHIN_S)
        self.standbys.learn(job, made, directory, load=True)
        await self.settled()
        return warm, said(directory).splitlines(), note

    async def settled(self) -> None:
        while tasks := list(self.standbys._tasks):
            await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S)

    def known(self, text: str) -> Known:
        return self.standbys._learnt.of(learnt.digest((sys.executable,), ("script.py",), text.encode()))


def play(folder: Path, story: Callable[[Node], Awaitable[None]], **options: int) -> None:
    async def whole() -> None:
        node = Node(folder, **options)
        try:
            await story(node)
        finally:
            await node.standbys.end_all()
        assert not list(node.folder.standbys.iterdir())

    asyncio.run(whole())


def test_what_a_script_imports_is_there_the_next_time(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        text = SCRIPT.format(before="", after="")
        assert await node.run(text) == (True, ["not ahead False", "none"], "")
        assert await node.run(text) == (True, ["ahead False", "none"], "")
        assert node.known(text).tried
        # A script that was changed is another one: what it does not import any more must not be loaded.
        assert (await node.run(text + "\n"))[1][0] == "not ahead False"

    play(tmp_path, story)


def test_the_present_server_serves_while_the_next_one_loads(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        text = SCRIPT.format(before="", after="")
        await node.run(text)
        blocked = node.site / "calm" / "part1.py"
        gate = tmp_path / "gate"
        gate.touch()
        await node.standbys.end_all()
        recipe = node.recipe(text)
        present, _ = await node.standbys._serve("job", node.standbys._hold(recipe, _plain(recipe)))
        blocked.write_text(f"import os, time\nwhile os.path.exists({str(gate)!r}): time.sleep(0.01)\n")
        assert (await node.standbys.ready("job", recipe))[0] is present
        gate.unlink()
        await node.settled()
        server, _ = await node.standbys.ready("job", recipe)
        assert server is not present
        assert server is not None
        assert server.state is not None
        assert "calm" in server.state.loaded

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("looks", "import os\nrank = os.environ.get('LOCAL_RANK')\n", "looks at LOCAL_RANK"),
        ("loud", "print('hello')\n", "prints"),
        ("thread", f"{THREAD}\n", "starts a thread"),
        ("child", "import subprocess\nchild = subprocess.Popen(['sleep', '5'])\n", "starts a process"),
        ("deadly", "import os\nif 'RANK' not in os.environ.keys(): os.abort()\n", "did not end"),
    ],
)  # fmt: skip
def test_a_module_that_is_unfit_is_left_to_the_rank(tmp_path: Path, name: str, text: str, why: str) -> None:
    async def story(node: Node) -> None:
        node.package(f"{name}.py", text)
        node.package("above.py", f"import {name}\n")
        script = SCRIPT.format(before="", after="import above, sys")
        first = await node.run(script)
        assert first[0]
        server, _ = await node.standbys.ready("job", node.recipe(script))
        assert server is not None
        assert server.state is not None
        assert why in server.state.unfit[name]
        assert {"calm", "calm.part3"} <= set(server.state.loaded)
        assert not {name, "above"} & set(server.state.loaded)
        second = await node.run(script)
        assert second[:1] == (True,)
        assert second[1] == ["ahead False", *first[1][1:]]

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("before", "after", "says", "ahead"),
    [
        ("import os; os.environ['CALM_MODE'] = 'set'", "", "set", True),
        ("import os; os.environ.setdefault('CALM_MODE', 'default')", "", "default", True),
        ("import os; os.environ['CALM_MODE'] = 'computed'.upper()", "", "COMPUTED", False),
        ("import os; os.environ.update(**{'CALM_' + 'MODE': 'hidden'})", "", "hidden", False),
        ("import os; os.environ.update(CALM_MODE='1')\nif 1: os.environ['CALM_MODE'] = '2'", "", "2", False),
        ("", "import os; os.environ['CALM_MODE'] = 'late'", "none", True),
        ("import beside", "", "beside", False),
    ],
)  # fmt: skip
def test_what_a_script_sets_before_its_imports_holds(
    tmp_path: Path, before: str, after: str, says: str, ahead: bool
) -> None:
    """Whichever way it is set, and whether the modules could be loaded ahead or not: never another value."""

    async def story(node: Node) -> None:
        (node.work / "beside.py").write_text("import os\nos.environ['CALM_MODE'] = ''.join('beside')\n")
        text = SCRIPT.format(before=before, after=after)
        for _ in range(2):
            warm, words, _ = await node.run(text)
            assert warm
            assert words[-1] == says
        _, words, _ = await node.run(text)
        assert words == [f"{'ahead' if ahead else 'not ahead'} False", says]

    play(tmp_path, story)


def test_what_keepstep_loads_by_itself_is_held_against_the_script_at_once(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        text = SCRIPT.format(before="import os; os.environ['CALM_MODE'] = 'x'.upper()", after="")
        made = replace(node.recipe(text), modules=("calm",))
        server, _ = await node.standbys.ready("job", made)
        file = launch_file(node.work, ("script.py",), warm=True, env=made.standby_env, early=dict(made.early))
        async with launched(tmp_path / "launch", file, standby=server) as shim:
            assert not shim.status.warm
            assert "sets CALM_MODE before its imports" in shim.status.note
            await shim.ended(timeout_s=WITHIN_S)
        assert said(tmp_path / "launch").splitlines()[-1] == "X"

    play(tmp_path, story)


def test_a_package_that_has_changed_is_loaded_anew(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        text = SCRIPT.format(before="", after="")
        await node.run(text)
        assert (await node.run(text))[1] == ["ahead False", "none"]
        node.package("calm/part0.py", "newer = 1")
        node.package("calm/__init__.py", "mode = 'newer'\n")
        assert (await node.run(text))[1] == ["ahead False", "newer"]

    play(tmp_path, story)


def test_jobs_that_load_the_same_share_a_server(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        made = node.recipe("print('x')")
        one, _ = await node.standbys.ready("one", made)
        two, _ = await node.standbys.ready("two", replace(made, cwd=tmp_path))
        other, _ = await node.standbys.ready("two", replace(made, env={**made.env, "SECRET": "x"}))
        assert one is two
        assert other is not one
        assert one is not None
        assert one.state is not None
        pid = one.state.pid
        told = [(status.job, status.state) for status in node.standbys.statuses()]
        assert sorted(told) == [("one", "ready"), ("two", "ready"), ("two", "ready")]
        await node.standbys.release({"two"})
        assert alive(pid)
        again, _ = await node.standbys.ready("three", made)
        assert again is one
        await node.standbys.release({"two"})
        await node.standbys.release(())
        for _ in range(1000):
            if not node.standbys.statuses():
                break
            await asyncio.sleep(0.01)
        await node.settled()
        until(lambda: not alive(pid))

    play(tmp_path, story, linger_s=0)


def test_a_server_that_nobody_needs_is_kept_for_a_while(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        made = node.recipe("print('x')")
        first, _ = await node.standbys.ready("one", made)
        await node.standbys.release(())
        assert [(status.job, status.state) for status in node.standbys.statuses()] == [("", "ready")]
        assert (await node.standbys.ready("two", made))[0] is first
        assert [status.job for status in node.standbys.statuses()] == ["two"]

    play(tmp_path, story)


def test_memory_has_a_limit(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        made = node.recipe("print('x')")
        server, why = await node.standbys.ready("one", made)
        assert server is None
        assert "may hold 1 MiB" in why
        assert [kind for kind, _ in node.events] == ["standby_broken"]
        assert [(s.state, s.memory_bytes) for s in node.standbys.statuses()] == [("broken", 0)]

    play(tmp_path, story, bytes_max=1 << 20)


def test_whoever_is_not_needed_makes_room(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        made = node.recipe("print('x')")
        first, _ = await node.standbys.ready("one", made)
        assert first is not None
        assert first.state is not None
        node.standbys._bytes_max = first.state.pss_bytes * 3 // 2
        other = replace(made, env={**made.env, "OTHER": "1"})
        assert (await node.standbys.ready("two", other))[0] is None
        await node.standbys.release(())
        server, _ = await node.standbys.ready("two", other)
        assert server is not None
        assert not alive(first.state.pid)

    play(tmp_path, story)


def _plain(recipe: Recipe) -> Wanted:
    return Wanted(modules=recipe.modules, given=recipe.given)
