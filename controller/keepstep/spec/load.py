"""From a file, or text, to a job: read, override, validate, resolve, check the fit.

Each stage tells all that it finds, in the order of the text; a stage runs only when the one before it found
nothing, since what follows from a mistake is not worth telling.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from keepstep.core.job import CommandRun, JobSpec, LlamaRun
from keepstep.spec.document import JobDocument
from keepstep.spec.fit import doubts, misfits
from keepstep.spec.overrides import apply_overrides
from keepstep.spec.problems import counted, refuse
from keepstep.spec.resolve import Unresolved, resolve
from keepstep.spec.source import Document, parse, read_file
from keepstep.spec.violations import problems_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    spec: JobSpec
    warnings: tuple[str, ...]
    parameters: int | None  # of the built-in trainer's model
    summary: str  # one line for people


def load(
    source: Path | str,
    source_name: str | None = None,
    overrides: Sequence[str] = (),
    *,
    base_dir: Path | None = None,
) -> JobSpec:
    """The job in a file (a Path) or in a text (a str); InputError with every problem, in order.

    `source_name` stands in messages; relative paths start from `base_dir`, else from the file's folder.
    """
    if isinstance(source, Path):
        text, shown = read_file(source), source_name or str(source)
        base, name = base_dir or source.parent, _name_from(source)
    else:
        text, shown = source, source_name or "<text>"
        base, name = base_dir or Path(), _name_from(Path(source_name)) if source_name else "job"
    document = apply_overrides(parse(text, shown), overrides)
    return _resolved(document, name=name, base=base.absolute())


def check(
    source: Path | str,
    source_name: str | None = None,
    overrides: Sequence[str] = (),
    *,
    base_dir: Path | None = None,
) -> Checked:
    """`load`, and what else there is to say of the job."""
    return checked(load(source, source_name, overrides, base_dir=base_dir))


def checked(spec: JobSpec) -> Checked:
    layout, resources = spec.parallelism, spec.resources
    where = counted(resources.nodes, "node") + (f" of pool {spec.pool}" if spec.pool != "local" else "")
    if resources.spares:
        where += f" and {counted(resources.spares, 'spare')}"
    match spec.run:
        case LlamaRun(model=model, batch=batch, steps=steps):
            named = f"{model.preset} model" if model.preset else "model"
            size = (
                f"{model.parameters / 1e9:.3f} B"
                if model.parameters >= 1e8
                else f"{model.parameters / 1e6:.1f} M"
            )
            micro = batch.micro_batches(layout.dp)
            length = f"{counted(steps, 'step')} of {batch.global_tokens:,} tokens"
            later = "".join(
                f"; {stage.global_tokens:,} in sequences of {stage.seq:,} after step {stage.after_steps:,}"
                for stage in batch.stages
            )
            per_replica = f"{counted(micro, 'micro-batch', 'micro-batches')} a replica"
            cut = f"{counted(batch.sequences, 'sequence')} of {batch.seq:,}, {per_replica}"
            what = f"llama3 {named}, {size} parameters, {length} ({cut}){later}"
            parameters: int | None = model.parameters
        case CommandRun(command=command):
            what, parameters = shlex.join(command), None
    summary = f"{spec.name}: {what}; {layout} = {counted(layout.world_size, 'rank')} on {where}"
    return Checked(spec=spec, warnings=tuple(doubts(spec)), parameters=parameters, summary=summary)


def command_spec(
    *,
    name: str,
    command: Sequence[str],
    nproc: int,
    nodes: int = 1,
    workdir: Path,
    env: Mapping[str, str] | None = None,
    pool: str = "local",
    overrides: Sequence[str] = (),
) -> JobSpec:
    """The job of `keepstep run`: a command in the folder it was typed in, nothing shipped.

    Ranks see the whole environment of their agent, which the command itself starts. It is named, not
    copied: what it holds is nobody's business. `env` is what was given beside it, by hand.
    """
    data = {
        "name": _name_from(Path(name)),
        "pool": pool,
        "resources": {"nodes": nodes, "gpus_per_node": nproc},
        "run": {
            "command": list(command),
            "workdir": str(workdir),
            "ship": "none",
            "env_from": [{"env": "*"}],
            "env": dict(env or {}),
        },
    }
    document = apply_overrides(Document(data=data, spots={}, source="keepstep run"), overrides)
    return _resolved(document, name=name, base=Path().absolute())


def _resolved(document: Document, *, name: str, base: Path) -> JobSpec:
    try:
        model = JobDocument.model_validate(document.data)
    except ValidationError as error:
        refuse([*document.problems, *problems_of(error)], document)
        raise AssertionError("a refusal without a problem") from error
    refuse(document.problems, document)
    try:
        spec = resolve(model, name=name, base=base)
    except Unresolved as unresolved:
        refuse(unresolved.problems, document)
        raise AssertionError("a refusal without a problem") from unresolved
    refuse(misfits(spec), document)
    return spec


def _name_from(file: Path) -> str:
    """A name for a job that was given none."""
    name = re.sub(r"[^a-z0-9]+", "-", file.stem.casefold()).strip("-")
    name = name if name[:1].isalpha() else f"job-{name}"
    return name[:48].strip("-") or "job"
