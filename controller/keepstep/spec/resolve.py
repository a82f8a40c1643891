"""From the document to the job: defaults that follow from other fields, paths made absolute, references."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

from keepstep.core import job
from keepstep.core.layout import Layout
from keepstep.spec.conflicts import conflicts
from keepstep.spec.document import JobDocument, ResourcesSection
from keepstep.spec.llama_document import BatchStageSection, MetricsSection
from keepstep.spec.presets import BYTE_VOCABULARY, PRESETS, USUAL_LR
from keepstep.spec.problems import Path, Problem
from keepstep.spec.run_document import LlamaSection, ModelSection, RunSection, TextSection

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)")
_NEEDED = ("dim", "layers", "heads", "kv_heads", "ffn_dim")
_MOST_WARMUP = 8000
_UNKNOWN_SEQ = 256  # of a model that is no preset


class Unresolved(Exception):
    """Carries problems to whoever can place them; never seen outside this folder."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)


def resolve(document: JobDocument, *, name: str, base: Folder) -> job.JobSpec:
    """Unresolved if it cannot be.

    `name` is for a job that has none; `base` is what relative paths start from.
    """
    problems = [*conflicts(document.run), *_addresses(document)]
    layout, problem = _layout(document)
    problems += [problem] if problem else []
    shape = None
    if document.run.llama is not None:
        shape, found = model_shape(document.run.llama.model)
        problems += found
    if problems:
        raise Unresolved(problems)
    run: job.LlamaRun | job.CommandRun
    if document.run.llama is not None and shape is not None:
        run = _llama(document.run, document.run.llama, shape, layout, base)
    else:
        run = _command(document.run, base)
    return job.JobSpec(
        name=document.name or name,
        project=document.project,
        queue=document.queue,
        priority=document.priority,
        pool=document.pool,
        resources=_resources(document.resources),
        parallelism=layout,
        elastic=job.Elastic(min_dp=layout.dp if document.elastic.min_dp is None else document.elastic.min_dp),
        run=run,
        checkpoint=_checkpoint(document, base),
        recovery=_recovery(document),
        notify=document.notify,
    )


def model_shape(section: ModelSection) -> tuple[job.ModelShape | None, list[Problem]]:
    given = {
        name: value for name in ModelSection.model_fields if (value := getattr(section, name)) is not None
    }
    if (scaling := section.rope_scaling) is not None:
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            what = f"low_freq_factor {scaling.low_freq_factor:g} is no less than high_freq_factor"
            at = ("run", "llama", "model", "rope_scaling")
            return None, [Problem(path=at, what=what, next="Llama 3.1 has 1 and 4.")]
        given["rope_scaling"] = job.RopeScaling(**scaling.model_dump())
    preset = given.pop("preset", None)
    if preset is not None:
        return replace(PRESETS[preset].shape, **given), []
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        what = f"neither a preset nor {', '.join(missing)}"
        next_ = f"Name a preset ({', '.join(PRESETS)}), or give {' '.join(_NEEDED)}."
        return None, [Problem(path=("run", "llama", "model"), what=what, next=next_)]
    fields: dict[str, Any] = {"vocabulary": BYTE_VOCABULARY, **given}
    return job.ModelShape(**fields), []


def _layout(document: JobDocument) -> tuple[Layout, Problem | None]:
    degrees, ranks = document.parallelism, _resources(document.resources).ranks
    if degrees.dp is not None:
        return Layout(tp=degrees.tp, pp=degrees.pp, cp=degrees.cp, dp=degrees.dp), None
    replica = degrees.tp * degrees.pp * degrees.cp
    dp, rest = divmod(ranks, replica)
    layout = Layout(tp=degrees.tp, pp=degrees.pp, cp=degrees.cp, dp=max(dp, 1))
    if not rest:
        return layout, None
    what = f"tp {degrees.tp} x pp {degrees.pp} x cp {degrees.cp} = {replica:,} ranks of a replica"
    what = f"{what}, which do not divide the {ranks:,} of resources."
    next_ = "Change resources, or tp, pp and cp."
    return layout, Problem(path=("parallelism",), what=what, next=next_)


def _resources(section: ResourcesSection) -> job.Resources:
    return job.Resources(
        nodes=section.nodes,
        gpus_per_node=section.gpus_per_node,
        spares=section.spares,
        labels=section.labels,
    )


def _llama(
    run: RunSection, section: LlamaSection, shape: job.ModelShape, layout: Layout, base: Folder
) -> job.LlamaRun:
    preset = PRESETS.get(shape.preset or "")
    batch, optimizer = section.batch, section.optimizer
    seq = batch.seq or min(preset.seq if preset else _UNKNOWN_SEQ, shape.max_seq)
    tokens = batch.global_tokens or seq * batch.micro_batch * layout.dp * 2 * layout.pp
    lr = optimizer.lr or (preset.lr if preset else USUAL_LR)
    warmup = (
        min(_MOST_WARMUP, section.steps // 10) if optimizer.warmup_steps is None else optimizer.warmup_steps
    )
    return job.LlamaRun(
        model=shape,
        data=replace(_text(section.data, base), holdout=section.data.holdout),
        steps=section.steps,
        batch=batch_of(job.Batch(global_tokens=tokens, seq=seq, micro_batch=batch.micro_batch), batch.stages),
        optimizer=job.Optimizer(
            lr=lr,
            min_lr=lr / 100 if optimizer.min_lr is None else optimizer.min_lr,
            warmup_steps=warmup,
            decay_steps=optimizer.decay_steps,
            anneal_steps=optimizer.anneal_steps,
            weight_decay=optimizer.weight_decay,
            beta1=optimizer.betas[0],
            beta2=optimizer.betas[1],
            eps=optimizer.eps,
            clip=optimizer.clip,
        ),
        pipeline=job.Pipeline(
            schedule=section.pipeline.schedule,
            chunks=section.pipeline.chunks or (2 if section.pipeline.schedule == "interleaved" else 1),
        ),
        numerics=job.Numerics(**section.numerics.model_dump()),
        evaluation=_evaluation(section, base),
        metrics=_metrics(section.metrics, base),
        seed=section.seed,
        init_from=_absolute(section.init_from, base),
        **_process(run),
    )


def batch_of(first: job.Batch, sections: Sequence[BatchStageSection]) -> job.Batch:
    """With its later stages; those that begin after so many tokens begin with a step."""
    stages: list[job.BatchStage] = []
    before: job.BatchSizes = first
    begun = used = 0  # steps and tokens before the last stage
    for section in sections:
        more = (section.after_tokens or 0) - used
        steps = section.after_steps or begun + max(0, -(-more // before.global_tokens))
        used, begun = used + (steps - begun) * before.global_tokens, steps
        before = job.BatchStage(
            after_steps=steps,
            global_tokens=section.global_tokens or before.global_tokens,
            seq=section.seq or before.seq,
            micro_batch=section.micro_batch or before.micro_batch,
        )
        stages.append(before)
    return replace(first, stages=tuple(stages))


def _text(section: TextSection, base: Folder) -> job.Data:
    return job.Data(
        source=section.source,
        path=_absolute(section.path, base),
        seed=section.seed,
        tokenizer=_absolute(section.tokenizer, base),
        weights=dict(section.weights),
    )


def _evaluation(section: LlamaSection, base: Folder) -> job.Evaluation | None:
    evaluation = section.evaluation
    if evaluation is None:
        return None
    text = None if evaluation.data is None else _text(evaluation.data, base)
    if text is not None and text.tokenizer is None:
        text = replace(text, tokenizer=_absolute(section.data.tokenizer, base))
    return job.Evaluation(every_steps=evaluation.every_steps, sequences=evaluation.sequences, data=text)


def _metrics(section: MetricsSection, base: Folder) -> job.Metrics:
    wandb = None
    if section.wandb is not None:
        wandb = job.Wandb(**section.wandb.model_dump() | {"dir": _absolute(section.wandb.dir, base)})
    return job.Metrics(tensorboard=_absolute(section.tensorboard, base), wandb=wandb)


def _command(run: RunSection, base: Folder) -> job.CommandRun:
    command = run.command or ("python", "-m", run.module or "", *run.args)
    return job.CommandRun(
        command=command,
        workdir=_absolute(run.workdir, base) or "",
        ship=run.ship,
        python=run.python,
        **_process(run),
    )


def _process(run: RunSection) -> dict[str, Any]:
    return {
        "env": dict(run.env),
        "env_from": tuple(job.EnvSource(source=s, name=n) for s, n in _sources(run)),
        "secrets": {variable: _secret(section) for variable, section in run.secrets.items()},
        "user": run.user,
        "umask": run.umask,
        "limits": dict(run.limits),
        "stop": job.Stop(signal=run.stop.signal, grace_s=run.stop.grace),
        "warn": job.Warn(signal=run.warn.signal, before_s=run.warn.before) if run.warn else None,
        "warm": run.warm,
        "preload": run.preload,
        "hook": run.hook,
        "logs": job.Logs(bytes=run.logs.size, files=run.logs.files),
    }


def _sources(run: RunSection) -> Iterator[tuple[Any, str]]:
    for section in run.env_from:
        for source in ("file", "env", "kubernetes"):
            if (name := getattr(section, source)) is not None:
                yield source, name


def _secret(section: Any) -> job.SecretRef:
    if section.file is not None:
        return job.SecretRef(source="file", name=section.file)
    if section.env is not None:
        return job.SecretRef(source="env", name=section.env)
    return job.SecretRef(source="kubernetes", name=section.kubernetes.secret, key=section.kubernetes.key)


def _checkpoint(document: JobDocument, base: Folder) -> job.Checkpoint:
    section = document.checkpoint
    folder = section.dir or ("./checkpoints" if document.run.llama is not None else None)
    return job.Checkpoint(
        dir=_absolute(folder, base),
        every_s=section.every.seconds,
        every_steps=section.every.steps,
        keep=section.keep,
        snapshot_every_steps=section.snapshot_every,
    )


def _addresses(document: JobDocument) -> Iterator[Problem]:
    """Where a folder is meant: an address that is read as a folder's name would be made on every node."""
    llama = document.run.llama
    yield from _address(("checkpoint", "dir"), document.checkpoint.dir)
    yield from _address(("run", "workdir"), document.run.workdir)
    if llama is not None:
        yield from _address(("run", "llama", "data", "path"), llama.data.path)
        if llama.evaluation is not None and llama.evaluation.data is not None:
            yield from _address(("run", "llama", "evaluation", "data", "path"), llama.evaluation.data.path)
        yield from _address(("run", "llama", "init_from"), llama.init_from)
        yield from _address(("run", "llama", "metrics", "tensorboard"), llama.metrics.tensorboard)


def _address(path: Path, value: str | None) -> Iterator[Problem]:
    if value is not None and _URL.match(value):
        yield Problem(
            path=path,
            what=f"{value} is a URL, and must be a path",
            why="agents and ranks read and write files, not object stores",
            next="Mount the storage at the same place on every node, and name that folder.",
        )


def _recovery(document: JobDocument) -> job.Recovery:
    section, llama = document.recovery, document.run.llama is not None
    return job.Recovery(
        hang_after_s=section.hang_after,
        hang_after_unknown_s=section.hang_after_unknown,
        start_within_s=section.start_within,
        restarts=job.Restarts(max=section.restarts.max, per_s=section.restarts.per),
        backoff=job.Backoff(
            first_s=section.backoff.first, factor=section.backoff.factor, max_s=section.backoff.max
        ),
        no_progress_max=section.no_progress_max,
        on_loss_spike=section.on_loss_spike,
        fenced=llama if section.fenced is None else section.fenced,
        self_fence_s=section.self_fence,
        orphan_lease_s=section.orphan_lease,
    )


def _absolute(path: str | None, base: Folder) -> str | None:
    if path is None:
        return None
    # Not resolved through links: the nodes may see other ones than this machine.
    parts: list[str] = []
    for part in (base / Folder(path).expanduser() if path.startswith("~") else base / path).parts:
        if part == ".." and len(parts) > 1 and parts[-1] != "..":
            parts.pop()
        elif part != "..":
            parts.append(part)
    return str(Folder(*parts))
