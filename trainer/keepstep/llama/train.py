"""The built-in trainer's life: join, restore or initialise, step, checkpoint, leave.

Ends with 0 when all steps are done, with 2 when the job cannot be trained as it is, with 143 after a TERM:
then every rank finishes the step in which the first of them heard it, a checkpoint is saved, and the job can
go on from there. Other failures end with a traceback and 1, also in TORCHELASTIC_ERROR_FILE.
"""

import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import ProcessGroup

from keepstep.core import cadence
from keepstep.core.errors import InputError, KeepstepError
from keepstep.llama import memory, parallel
from keepstep.llama.data import Corpus, Cut
from keepstep.llama.evaluation import Evaluator, Validation
from keepstep.llama.initial import initialise
from keepstep.llama.job import Checkpointing, TrainJob
from keepstep.llama.memory import Snapshots
from keepstep.llama.metrics import Metrics, writers_of
from keepstep.llama.optimizer import Update
from keepstep.llama.tokenizer import open_tokenizer
from keepstep.llama.trainer import Rates, Trainer
from keepstep.session import Phase, Session, current

if TYPE_CHECKING:
    from keepstep.llama import checkpoint

STOPPED = 128 + signal.SIGTERM
_COST_S = 1.0  # of a save, before one was made
Beside = Callable[[], ProcessGroup | None]  # a group for checkpoints alone, made when it is needed first


class StopSignal:
    """Remembers that TERM came; the training loop asks after each step."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.came = True


def main() -> int:
    """The process's outermost boundary: everything ends as an exit code with its reason told."""
    try:
        return run(TrainJob.of_environment(), current())
    except KeepstepError as error:
        sys.stderr.write(f"{error}\n")
        _leave_word(str(error), traceback.format_exc())
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - outermost
        traceback.print_exc()
        _leave_word(f"{type(error).__name__}: {error}", traceback.format_exc())
        return 1


def run(job: TrainJob, session: Session) -> int:
    stop = StopSignal()
    device = parallel.device_of(os.environ)
    session.phase(Phase.RENDEZVOUS)
    groups = parallel.join(job.layout, device, timeout_s=job.timeout_s)
    session.phase(Phase.RESTORING)
    corpus = open_corpus(job, job.data)
    evaluated = None if job.evaluation is None else evaluation_text(job, corpus)
    trainer = Trainer(job, groups, corpus, device=device, session=session)
    beside = functools.cache(lambda: parallel.beside(groups, timeout_s=job.timeout_s))
    snapshots = Snapshots(
        job, trainer.state, session,
        lambda step: {"tokens": job.tokens(step), "data": corpus.position(step)},
    )  # fmt: skip
    begin(trainer, corpus, beside, snapshots)
    metrics = Metrics(writers_of(job, trainer.state.step) if trainer.reports else {})
    keeper = Keeper(trainer, corpus, beside)
    examiner = Examiner(trainer, evaluated, metrics)
    stopped = _loop(trainer, keeper, snapshots, examiner, metrics, stop)
    keeper.finish()
    if not stopped:
        examiner.evaluate()
    metrics.close()
    snapshots.close()
    session.phase(Phase.FINISHED)
    parallel.leave()
    return STOPPED if stopped else 0


def open_corpus(job: TrainJob, data: Mapping[str, Any]) -> Corpus:
    tokenizer = data.get("tokenizer")
    corpus = Corpus.open(
        data.get("source", "stdlib"), data.get("path"), seed=data.get("seed", job.seed), seq=job.seq,
        sequences_per_step=job.sequences, tokenizer=open_tokenizer(tokenizer) if tokenizer else None,
        weights=data.get("weights"), holdout=data.get("holdout") or 0.0,
        stages=[
            Cut(after_steps=stage.after_steps, seq=stage.seq, sequences=stage.global_tokens // stage.seq)
            for stage in job.stages
        ],
    )  # fmt: skip
    corpus.check_vocabulary(job.shape.vocabulary)
    return corpus


def evaluation_text(job: TrainJob, corpus: Corpus) -> Corpus:
    """The text to evaluate on: data of its own, else what is held out of the training text."""
    assert job.evaluation is not None
    if job.evaluation.data is not None:
        return open_corpus(job, job.evaluation.data)
    if not corpus.held:
        raise InputError(
            "there is nothing to evaluate on", where="evaluation",
            next="Hold documents out with data.holdout, or name other text under evaluation.data.",
        )  # fmt: skip
    return corpus.of_held()


def begin(trainer: Trainer, corpus: Corpus, beside: Beside, snapshots: Snapshots) -> None:
    """The state of the first step: from memory or the checkpoint to restore, given weights, or chance."""
    job, state = trainer.job, trainer.state
    if job.memory is not None:
        corpus.check(memory.load(job, state, snapshots.slots, dp_rank=trainer.groups.at.dp)["data"])
    elif job.restore is not None:
        from keepstep.llama.checkpoint import load

        if job.checkpoint is None:
            raise InputError("there is no checkpoint folder to restore from", where="checkpoint.dir")
        manifest = load(job.checkpoint.folder, job.restore, state, model=job.shape, group=beside())
        corpus.check(manifest.data)
    elif job.init_from is not None:
        from keepstep.llama.weights import init_from

        init_from(Path(job.init_from), state, job.shape, group=beside())
    else:
        initialise(state, job.shape, job.seed)
    trainer.optimizer.publish()
    if job.restore is not None:
        snapshots.resume(state.step)
    trainer.session.resumed(state.step)


class Examiner:
    """Evaluates after every so many steps, and at the end; says nothing where that is not wanted."""

    def __init__(self, trainer: Trainer, text: Corpus | None, metrics: Metrics) -> None:
        self._trainer, self._metrics, config = trainer, metrics, trainer.job.evaluation
        self._every, self._evaluator = 0, None
        if config is not None and text is not None:
            self._every = config.every_steps
            self._evaluator = Evaluator(trainer, text, sequences=config.sequences)

    def before_step(self) -> None:
        """Also before the first step after a restart: its evaluation may not have been completed."""
        if self._every and (step := self._trainer.state.step) and step % self._every == 0:
            self.evaluate()

    def evaluate(self) -> None:
        if self._evaluator is None:
            return
        trainer = self._trainer
        found = self._evaluator.evaluate()
        trainer.session.phase(Phase.NONE)  # it is complete
        if trainer.reports:
            leave_evaluation(found)
            sys.stdout.write(validation_line(found, trainer.job.steps) + "\n")
            sys.stdout.flush()
            parts = found.by_source if len(found.by_source) > 1 else {}
            by_source = {f"validation/{source}": loss for source, loss in parts.items()}
            self._metrics.write(found.step, {"validation/loss": found.loss, **by_source})


class Keeper:
    """Decides when to save, and saves beside training."""

    def __init__(self, trainer: Trainer, corpus: Corpus, beside: Beside) -> None:
        self._trainer, self._corpus, self._beside = trainer, corpus, beside
        self._last = time.monotonic()
        self._cost_s = _COST_S  # of a save, for training
        self._saver: checkpoint.Saver | None = None  # from the first save on, which is the same on all ranks

    @property
    def due(self) -> bool:
        """Whether this rank's clock wants a save. What is done is what any rank wanted."""
        config = self._trainer.job.checkpoint
        if config is None or config.every_steps:
            return False
        every_s = config.every_s
        if every_s is None and config.mtbf_s is not None:
            every_s = cadence.save_interval_s(self._cost_s, config.mtbf_s)
        return every_s is not None and time.monotonic() - self._last >= every_s

    def after_step(self, *, wanted: bool) -> None:
        """Every rank decides the same: `wanted` is what all of them know."""
        config, step = self._trainer.job.checkpoint, self._trainer.state.step
        if config is None:
            return
        if wanted or (config.every_steps and step % config.every_steps == 0):
            self._save(config)
        if self._saver is not None:
            self._saver.poll()

    def finish(self) -> None:
        """Save the last state, wherever training ended."""
        if (config := self._trainer.job.checkpoint) is not None:
            self._save(config).close()

    def _save(self, config: Checkpointing) -> "checkpoint.Saver":
        trainer = self._trainer
        job, step = trainer.job, trainer.state.step
        trainer.session.phase(Phase.CHECKPOINT)
        if self._saver is None:
            from keepstep.llama.checkpoint import Identity, Saver

            self._saver = Saver(
                config.folder, trainer.state,
                Identity(
                    job=job.id, attempt=job.attempt, layout=job.layout, model=job.shape, branches=job.branches
                ),
                group=self._beside(), session=trainer.session, keep=config.keep, wait_s=job.timeout_s,
            )  # fmt: skip
        begun = time.monotonic()
        self._saver.save(step, tokens=job.tokens(step), data=self._corpus.position(step))
        self._last = time.monotonic()
        self._cost_s = self._last - begun
        return self._saver


def _loop(
    trainer: Trainer,
    keeper: Keeper,
    snapshots: Snapshots,
    examiner: Examiner,
    metrics: Metrics,
    stop: StopSignal,
) -> bool:
    """Steps until all are done (False) or a rank was told to stop (True)."""
    job, session, state, first = trainer.job, trainer.session, trainer.state, True
    while state.step < job.steps:
        examiner.before_step()
        started = time.perf_counter()
        update = trainer.step((stop.came, keeper.due), says=lambda: snapshots.says, gate=snapshots.complete)
        snapshots.heard(update.least)
        snapshots.take(state.step)
        rates = trainer.rates(time.perf_counter() - started)
        session.step_done(
            state.step,
            loss=None if update.skipped else update.loss,
            grad_norm=None if update.skipped else update.grad_norm,
            tokens_per_s=rates.tokens_per_s, tflops=rates.tflops, mfu=rates.mfu,
        )  # fmt: skip
        if trainer.reports:
            sys.stdout.write(line(state.step, job.steps, update, rates) + "\n")
            sys.stdout.flush()
            if first:
                sys.stderr.write(
                    f"rank {session.rank} holds {trainer.held()} (at most {trainer.expected()})\n"
                )
                first = False
            metrics.write(state.step, figures(job, state.step, update, rates))
        told_to_stop, save_due = update.asks
        if told_to_stop:
            return True
        keeper.after_step(wanted=save_due)
    return False


def figures(job: TrainJob, step: int, update: Update, rates: Rates) -> dict[str, float]:
    """Of the update that made `step` completed steps."""
    trained = {"train/loss": update.loss, "train/grad_norm": update.grad_norm}
    return {
        **({} if update.skipped else trained),
        "train/learning_rate": job.optimizer.lr_at(step - 1, job.steps),
        "train/tokens": float(job.tokens(step)),
        "speed/tokens_per_s": rates.tokens_per_s,
        "speed/tflops": rates.tflops,
        "speed/mfu": rates.mfu,
    }


def line(step: int, steps: int, update: Update, rates: Rates) -> str:
    """step 40/120 loss 2.913 grad 0.81 3.8 k tokens/s 1.2 GFLOPs/slot"""
    mfu = "" if rates.mfu != rates.mfu else f" MFU {rates.mfu:.1%}"
    return (
        f"step {step}/{steps} loss {update.loss:.3f} grad {update.grad_norm:.2f} "
        f"{_scaled(rates.tokens_per_s)} tokens/s {_scaled(rates.tflops * 1e12, 'FLOPs')}/slot{mfu}"
    )


def validation_line(found: Validation, steps: int) -> str:
    """step 40/120 validation loss 2.931 (code 2.104, web 3.758)"""
    parts = ", ".join(f"{source} {loss:.3f}" for source, loss in found.by_source.items())
    each = f" ({parts})" if len(found.by_source) > 1 else ""
    return f"step {found.step}/{steps} validation loss {found.loss:.3f}{each}"


def _scaled(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 3.8 k, 1.2 GFLOPs."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def leave_evaluation(found: Validation) -> None:
    """A line of JSON beside the job's file: the agent takes it from there. If it cannot, training goes on."""
    if name := os.environ.get("KEEPSTEP_JOB_FILE"):
        path = Path(name).with_name("evaluations.jsonl")
        try:
            with path.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
        except OSError as error:
            sys.stderr.write(
                f"the evaluation of step {found.step} is not recorded: {path}: {error.strerror}\n"
            )


def _leave_word(message: str, trace: str) -> None:
    """What torchrun's error file holds, for whoever reads the failure of the gang."""
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        Path(name).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
