"""From a Launch to what its shim is to start. What can fail on this node fails here, with a reason.

Nothing of the attempt runs yet. Whatever is wrong with the job on this node (no such script, no such secret,
no such user) is an InputError, and the attempt is refused with it.
"""

import json
import os
import pwd
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from keepstep.agent import learnt, rankenv, ras, secrets, setting
from keepstep.agent.evidence import control_socket, error_file
from keepstep.agent.rank.protocol import LaunchFile, RankLaunch, Rotate, Stop
from keepstep.agent.standby import DEFAULT_MODULES, TRAINER_MODULES
from keepstep.core import checkpoints, durable
from keepstep.core.checkpoints import Branch, Point
from keepstep.core.errors import InputError
from keepstep.core.ids import Attempt, JobId, Step
from keepstep.core.job import CommandRun, LlamaRun
from keepstep.wire.messages import Launch

TRAINER: tuple[str, ...] = ("-m", "keepstep.llama")
_TORCH_WORDS = ("torch", "transformers", "lightning", "accelerate")
_SCAN_ENTRIES, _SCAN_FILES, _SCAN_BYTES = 5000, 200, 4 << 20
_PLAIN_PYTHON = {"python", "python3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What of a launch is this node's to say."""

    node: str
    directory: Path  # the attempt's
    slots: tuple[int, ...]
    gpus: tuple[str, ...]  # devices of these slots; empty: CPU
    address: str
    interface: str
    carrier: str = ""  # its folder; "": no snapshots in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a job's processes are made on this node, whichever the attempt; also for standby servers."""

    run: LlamaRun | CommandRun
    interpreter: tuple[str, ...]
    argv: tuple[str, ...]
    python: bool
    env: Mapping[str, str] = field(repr=False)  # it holds secrets
    cwd: Path
    modules: tuple[str, ...]  # to preload; empty: start cold
    cold_reason: str = ""
    script: str = ""  # whose imports are learnt, by its content; empty: nothing is
    early: Mapping[str, str | None] = field(default_factory=dict, repr=False)  # set before its imports
    late: frozenset[str] = frozenset()  # variables that the script sets after them

    @property
    def given(self) -> dict[str, str]:
        """What can be set for a standby's imports as the script does for its own."""
        return {name: value for name, value in self.early.items() if value is not None}

    @property
    def standby_cwd(self) -> str:
        """Only relative entries of sys.path depend on it; else jobs of all folders may share a server."""
        entries = self.env.get("PYTHONPATH", "").split(os.pathsep)
        return "/" if all(entry.startswith("/") or not entry for entry in entries) else str(self.cwd)

    @property
    def standby_env(self) -> dict[str, str]:
        """The same for every attempt and size of the gang, so that one server serves them all."""
        env = dict(self.env)
        env.setdefault("OMP_NUM_THREADS", "1")
        return env


def read_run(run: Mapping[str, Any]) -> LlamaRun | CommandRun:
    """Errors: InputError for a run of a newer version that this agent cannot start."""
    kind = run.get("kind") or ("llama" if "model" in run else "command")
    try:
        match kind:
            case "llama":
                return msgspec.convert(dict(run), LlamaRun)
            case "command":
                return msgspec.convert(dict(run), CommandRun)
    except msgspec.ValidationError as error:
        raise InputError(f"this agent cannot read how to run a {kind}", why=str(error)) from error
    raise InputError(f"this agent does not know how to run a {kind!r}", next="Upgrade the agent.")


def recipe(run: LlamaRun | CommandRun, workdir: Path, environ: Mapping[str, str]) -> Recipe:
    """Errors: InputError for what is not there on this node."""
    _check_user(run.user)
    if not workdir.is_dir():
        raise InputError("the work folder is not on this node", where=str(workdir))
    env = {
        **rankenv.inherited(environ),
        **secrets.resolve(run.env_from, {}, environ),
        **run.env,
        **secrets.resolve((), run.secrets, environ),
    }
    env.setdefault("PYTHONUNBUFFERED", "1")  # what a rank printed must not die with it
    if run.hook:
        env = rankenv.hooked(env)
    if isinstance(run, LlamaRun):
        interpreter: tuple[str, ...] = (sys.executable,)
        argv, python = TRAINER, True
        modules: tuple[str, ...] = TRAINER_MODULES
    else:
        interpreter, argv, python = (_interpreter(run, workdir, env),), run.argv, run.is_python
        _check_command(argv, python, workdir, env)
        modules = DEFAULT_MODULES
    cold = _cold_reason(run, python, argv, workdir)
    made = Recipe(
        run=run, interpreter=interpreter, argv=argv, python=python, env=env, cwd=workdir,
        modules=() if cold else (*modules, *run.preload), cold_reason=cold,
    )  # fmt: skip
    return made if cold or isinstance(run, LlamaRun) else _with_script(made)


def _with_script(made: Recipe) -> Recipe:
    """What its source says: the built-in trainer's imports are known, a native command has none."""
    if made.argv[0] == "-m":
        return replace(made, script=learnt.digest(made.interpreter, made.argv, b""))
    path = made.cwd / made.argv[0]
    settings = setting.settings_of(path, made.env)
    return replace(
        made, script=learnt.digest(made.interpreter, made.argv, path.read_bytes()),
        early=settings.early, late=frozenset(settings.late),
    )  # fmt: skip


def launch_file(launch: Launch, made: Recipe, site: Site) -> LaunchFile:
    """What the shim reads. Writes job.json beside it for the built-in trainer."""
    place = rankenv.Place(
        job=launch.job, attempt=launch.attempt, world_size=launch.world_size, nodes=len(launch.nodes),
        node_rank=launch.node_rank, ranks=launch.ranks,
    )  # fmt: skip
    job_file = ""
    if isinstance(made.run, LlamaRun):
        path = site.directory / "job.json"
        durable.write_json(path, job_document(launch, made.run))
        job_file = str(path)
    ranks = tuple(
        RankLaunch(
            rank=rank,
            local_rank=k,
            slot=site.slots[k],
            env=rankenv.rank_env(
                place,
                k,
                error_file=str(error_file(site.directory, rank)),
                job_file=job_file,
                control=str(control_socket(site.directory, rank)) if made.run.hook else "",
                carrier=site.carrier,
                snapshot_every=launch.checkpoint.get("snapshot_every_steps"),
            ),
        )
        for k, rank in enumerate(launch.ranks)
    )
    run = made.run
    return LaunchFile(
        job=launch.job, attempt=launch.attempt, node=site.node, world_size=launch.world_size,
        nodes=len(launch.nodes), node_rank=launch.node_rank, ranks=ranks, argv=made.argv, python=made.python,
        interpreter=made.interpreter, cwd=str(made.cwd),
        env=rankenv.node_env(
            place, made.env, interface=site.interface, gpus=site.gpus,
            flights=str(site.directory / "flight-"), ras_port=ras.reserve(site.directory) if site.gpus else 0,
        ),
        umask=run.umask, limits=dict(run.limits), rotate=Rotate(bytes=run.logs.bytes, files=run.logs.files),
        store=launch.node_rank == 0, bind_address=site.address,
        stop=Stop(signal=run.stop.signal, grace_s=run.stop.grace_s), warm=bool(made.modules),
        early=dict(made.early),
    )  # fmt: skip


def job_document(launch: Launch, run: LlamaRun) -> dict[str, Any]:
    """job.json, as the built-in trainer reads it."""
    plain: dict[str, Any] = json.loads(msgspec.json.encode(run))
    restore = None if launch.restore is None else dict(zip(("attempt", "step"), launch.restore, strict=True))
    return {
        "job": launch.job,
        "name": launch.name,
        "attempt": launch.attempt,
        "layout": launch.layout,
        "virtual_dp": launch.replicas,
        **{
            name: plain[name]
            for name in (
                "model",
                "data",
                "steps",
                "batch",
                "optimizer",
                "pipeline",
                "numerics",
                "evaluation",
                "metrics",
                "seed",
                "init_from",
            )
        },
        "checkpoint": launch.checkpoint,
        "restore": restore,
        "memory": launch.memory.layout if launch.memory else None,
        "lineage": [list(branch) for branch in launch.lineage],
        "skip_steps": list(launch.skip_steps),
    }


def fence(launch: Launch) -> None:
    """Before any rank of this attempt starts: where it branches off, and that older ones commit no more.

    Done by the agent of node rank 0. Folders that are no path of this machine are the trainer's own affair.
    """
    folder = checkpoint_folder(launch)
    if folder is None or launch.node_rank != 0:
        return
    _, parent, step = next(
        (branch for branch in launch.lineage if branch[0] == launch.attempt), (launch.attempt, 0, 0)
    )
    newer = checkpoints.read_fence(folder)
    if newer is not None and newer > launch.attempt:
        raise InputError(f"the checkpoint folder already belongs to attempt {newer}", where=str(folder))
    branch = Branch(
        job=JobId(launch.job),
        attempt=Attempt(launch.attempt),
        parent=Point(attempt=Attempt(parent), step=Step(step)) if parent else None,
    )
    try:
        checkpoints.write_branch(folder, branch)
        checkpoints.raise_fence(folder, Attempt(launch.attempt))
    except OSError as error:
        raise InputError(
            "the checkpoint folder cannot be written", where=str(folder), why=str(error)
        ) from error


def checkpoint_folder(launch: Launch) -> Path | None:
    folder = launch.checkpoint.get("dir")
    if not isinstance(folder, str) or "://" in folder:
        return None
    return Path(folder)


def _check_user(user: str | None) -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name if user is not None else None
    if user != own:
        raise InputError(
            f"the job is to run as {user}, and this agent runs as {own}",
            next=f"Start an agent as {user} on this node, or leave run.user out.",
        )


def _interpreter(run: CommandRun, workdir: Path, env: Mapping[str, str]) -> str:
    wanted = run.python
    first = run.command[0]
    if wanted is None and run.is_python and not first.endswith(".py") and first not in _PLAIN_PYTHON:
        wanted = first
    if wanted is None:
        return sys.executable
    found = _which(wanted, workdir, env)
    if found is None:
        raise InputError(
            f"there is no interpreter {wanted} on this node", next="Set run.python to one there is."
        )
    return found


def _check_command(argv: tuple[str, ...], python: bool, workdir: Path, env: Mapping[str, str]) -> None:
    if python:
        if argv[0] != "-m" and not (workdir / argv[0]).is_file():
            raise InputError(f"there is no script {argv[0]} on this node", where=str(workdir))
    elif _which(argv[0], workdir, env) is None:
        raise InputError(f"there is no command {argv[0]} on this node", where=str(workdir))


def _which(name: str, workdir: Path, env: Mapping[str, str]) -> str | None:
    if "/" in name:
        path = workdir / Path(name).expanduser()
        return str(path) if path.is_file() and os.access(path, os.X_OK) else None
    return shutil.which(name, path=env.get("PATH", os.defpath))


def _cold_reason(run: LlamaRun | CommandRun, python: bool, argv: tuple[str, ...], workdir: Path) -> str:
    """Why ranks are started from nothing; "": they are forked from a process that has torch loaded."""
    if run.warm == "never":
        return "run.warm is never"
    if not python:
        return "it is no Python script"
    if isinstance(run, LlamaRun) or run.preload or argv[0] == "-m":
        return ""
    return "" if _mentions_torch(workdir / argv[0], workdir) else "nothing in its folder mentions torch"


def _mentions_torch(script: Path, workdir: Path) -> bool:
    """A guess that saves small scripts the seconds it takes to load torch. Bounded; in doubt, yes."""
    files, entries, left = [script], 0, _SCAN_BYTES
    for folder, folders, names in os.walk(workdir):
        folders[:] = [name for name in folders if not name.startswith(".")]
        entries += len(folders) + len(names)
        files += [Path(folder) / name for name in names if name.endswith(".py")]
        if entries > _SCAN_ENTRIES or len(files) > _SCAN_FILES:
            return True
    for path in files:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        left -= len(text)
        if left < 0 or any(word in text for word in _TORCH_WORDS):
            return True
    return False
