"""What a rank is told about its job: the file that KEEPSTEP_JOB_FILE names, checked."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from keepstep.core.checkpoints import Branch, Point
from keepstep.core.errors import InputError
from keepstep.core.footprint import Training
from keepstep.core.ids import Attempt, JobId, Step
from keepstep.core.layout import Layout
from keepstep.llama.flat import check_layout
from keepstep.llama.float8 import check_shape
from keepstep.llama.numerics import PLAIN, PRECISIONS, RECOMPUTATIONS, SHARDS, Numerics
from keepstep.llama.optimizer import OptimizerConfig
from keepstep.llama.schedule import ONE_CHUNK, SCHEDULES, Pipeline
from keepstep.llama.shape import ModelShape

COLLECTIVE_TIMEOUT_S = 600.0  # hangs are found by the agents, long before


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """Neither interval: by Young's rule, where `mtbf_s` is known. When stopped and at the end in any case."""

    folder: Path
    every_steps: int | None = None
    every_s: float | None = None
    mtbf_s: float | None = None
    keep: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStage:
    """A later stage of training, with another batch."""

    after_steps: int
    global_tokens: int
    seq: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    every_steps: int  # and at the end
    sequences: int  # of each source, at most
    data: Mapping[str, Any] | None = None  # None: what data.holdout holds out


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    id: str
    attempt: int
    layout: Layout
    replicas: int  # that the spec asked for; the present dp divides it, and the result is the same
    shape: ModelShape
    data: Mapping[str, Any]  # source, path, seed, holdout
    steps: int
    global_tokens: int  # of a step; this and the next two: in the first stage
    seq: int
    micro_batch: int  # sequences
    optimizer: OptimizerConfig
    seed: int
    checkpoint: Checkpointing | None
    restore: Point | None
    memory: Layout | None  # the layout in which the state to restore is in memory; None: it is in storage
    snapshot_every: int | None  # steps; None: as often as it can be afforded, 0: never
    branches: tuple[Branch, ...]  # the lineage, this attempt included
    init_from: str | None
    timeout_s: float  # of every collective
    pipeline: Pipeline = ONE_CHUNK
    numerics: Numerics = PLAIN
    skip_steps: frozenset[int] = frozenset()  # whose batch did harm: no update is made of it
    evaluation: Evaluation | None = None
    stages: tuple[BatchStage, ...] = ()  # later ones, in their order
    metrics: Mapping[str, Any] = field(
        default_factory=dict
    )  # tensorboard: folder; wandb: what its init takes

    def at(self, step: int) -> "TrainJob":
        """The same with the batch of the step that follows `step` completed ones."""
        begun = [stage for stage in self.stages if stage.after_steps <= step]
        if not begun:
            return self
        now = begun[-1]
        return replace(self, global_tokens=now.global_tokens, seq=now.seq, micro_batch=now.micro_batch)

    def tokens(self, steps: int) -> int:
        """That so many steps train on."""
        edges = [0, *(min(stage.after_steps, steps) for stage in self.stages), steps]
        return sum(self.at(a).global_tokens * (b - a) for a, b in pairwise(edges))

    @property
    def sequences(self) -> int:
        """Of a step, over all replicas."""
        return self.global_tokens // self.seq

    @property
    def sequences_per_replica(self) -> int:
        return self.sequences // self.replicas

    @property
    def heads_and_tails(self) -> int:
        """Chunks that context parallel ranks cut a sequence into."""
        return 2 * self.layout.cp if self.layout.cp > 1 else 1

    @property
    def micro_batches(self) -> int:
        """Of a replica in a step."""
        return self.sequences_per_replica // self.micro_batch

    def training(self, *, element: int, cuda: bool) -> Training:
        """What decides the memory of a rank; `element`: bytes of the precision that is computed in."""
        return Training(
            seq=self.seq, micro_batch=self.micro_batch, micro_batches=self.micro_batches,
            replicas=self.replicas, schedule=self.pipeline.schedule, chunks=self.pipeline.chunks,
            recompute=self.numerics.recompute, shard=self.numerics.shard, element=element, cuda=cuda,
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> "TrainJob":
        try:
            return cls.parse(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise InputError("the job file cannot be read", where=str(path), why=str(error)) from error

    @classmethod
    def of_environment(cls) -> "TrainJob":
        name = os.environ.get("KEEPSTEP_JOB_FILE")
        if not name:
            raise InputError(
                "there is no job to train", where="KEEPSTEP_JOB_FILE", why="the variable is not set",
                next="Submit a job whose run is `llama`; keepstep starts this program for each rank.",
            )  # fmt: skip
        return cls.read(Path(name))

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "TrainJob":
        """InputError for what is missing and for a layout that fits neither model nor batch."""
        try:
            layout = Layout(**value["layout"])
            batch = value["batch"]
            job = cls(
                id=value["job"], attempt=value.get("attempt", 1), layout=layout,
                replicas=value.get("virtual_dp") or layout.dp, shape=ModelShape.of(value["model"]),
                data=value.get("data") or {}, steps=value["steps"], global_tokens=batch["global_tokens"],
                seq=batch["seq"], micro_batch=batch.get("micro_batch") or batch.get("micro") or 1,
                optimizer=OptimizerConfig.parse(value.get("optimizer") or {}), seed=value.get("seed", 0),
                checkpoint=_checkpointing(value.get("checkpoint")), restore=_point(value.get("restore")),
                memory=Layout(**value["memory"]) if value.get("memory") else None,
                snapshot_every=(value.get("checkpoint") or {}).get("snapshot_every_steps"),
                branches=tuple(_branches(value)), init_from=value.get("init_from"),
                timeout_s=value.get("timeout_s", COLLECTIVE_TIMEOUT_S),
                pipeline=Pipeline(**(value.get("pipeline") or {})),
                numerics=Numerics(**(value.get("numerics") or {})),
                skip_steps=frozenset(value.get("skip_steps") or ()),
                evaluation=Evaluation(**value["evaluation"]) if value.get("evaluation") else None,
                metrics=value.get("metrics") or {},
                stages=tuple(BatchStage(**stage) for stage in batch.get("stages") or ()),
            )  # fmt: skip
        except KeyError as error:
            raise InputError(f"the job has no {error}", where="job file") from error
        job.check()
        return job

    def check(self) -> None:
        check_layout(self.shape, self.layout, self.replicas, self.pipeline.chunks)
        for step in (0, *(stage.after_steps for stage in self.stages)):
            self.at(step)._check_batch()
        self._check_options()

    def _check_batch(self) -> None:
        for number, noun, part, reason in (
            (self.global_tokens, "tokens of a step", self.seq, "the length of a sequence"),
            (self.sequences, "sequences of a step", self.replicas, "the number of replicas"),
            (self.sequences_per_replica, "sequences of a replica", self.micro_batch, "the micro-batch"),
            (self.seq, "tokens of a sequence", self.heads_and_tails, "twice context parallel"),
            (
                self.micro_batch * self.seq // self.layout.cp,
                "tokens of a micro-batch on a rank",
                self.layout.tp,
                "tensor parallel",
            ),
        ):
            if number % part:
                raise InputError(
                    f"{number:,} {noun} cannot be cut", where="batch",
                    why=f"{reason}, {part:,}, does not divide it",
                    next="Choose a global batch that is a multiple of seq x replicas x micro-batch.",
                )  # fmt: skip
        if self.seq > self.shape.max_seq:
            raise InputError(
                f"sequences of {self.seq:,} tokens are too long", where="batch.seq",
                why=f"the model has positions up to {self.shape.max_seq:,}", next="Raise model.max_seq.",
            )  # fmt: skip

    def _check_options(self) -> None:
        schedule, chunks = self.pipeline.schedule, self.pipeline.chunks
        for where, word, known in (
            ("pipeline.schedule", schedule, SCHEDULES),
            ("numerics.precision", self.numerics.precision, PRECISIONS),
            ("numerics.recompute", self.numerics.recompute, RECOMPUTATIONS),
            ("numerics.shard", self.numerics.shard, SHARDS),
        ):
            if word not in known:
                raise InputError(f"there is no {word!r}", where=where, next=f"Known: {', '.join(known)}.")
        if self.numerics.float8:
            check_shape(self.shape, self.layout, self.numerics.precision)
        if schedule == "1f1b" and chunks > 1:
            raise InputError(
                f"{chunks} chunks a rank", where="pipeline.chunks", why="1f1b knows one",
                next="Choose the schedule interleaved or gpipe.",
            )  # fmt: skip


def _checkpointing(value: Mapping[str, Any] | None) -> Checkpointing | None:
    if not value or not value.get("dir"):
        return None
    return Checkpointing(
        folder=Path(value["dir"]), every_steps=value.get("every_steps"), every_s=value.get("every_s"),
        mtbf_s=value.get("mtbf_s"), keep=value.get("keep", 3),
    )  # fmt: skip


def _point(value: Mapping[str, Any] | None) -> Point | None:
    return Point(step=Step(value["step"]), attempt=Attempt(value["attempt"])) if value else None


def _branches(value: Mapping[str, Any]) -> Iterator[Branch]:
    """lineage: [attempt, parent attempt, parent step] of each ancestor; parent 0: none."""
    for attempt, parent, step in value.get("lineage") or ():
        start = Point(step=Step(step), attempt=Attempt(parent)) if parent else None
        yield Branch(job=JobId(value["job"]), attempt=Attempt(attempt), parent=start)
