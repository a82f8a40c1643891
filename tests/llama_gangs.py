"""The parent of test_llama_parallel: reads what to train, forks a gang for it, writes what came out."""

import hashlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import keepstep.llama.preload  # noqa: F401
from keepstep.core.checkpoints import Point
from keepstep.core.ids import Attempt, Step
from keepstep.llama import parallel
from keepstep.llama.checkpoint import Identity, Saver, load
from keepstep.llama.data import Batch, Corpus
from keepstep.llama.evaluation import Evaluator
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.optimizer import Update
from keepstep.llama.tokenizer import Tokens
from keepstep.llama.train import main as main_of_trainer
from keepstep.llama.trainer import Trainer
from keepstep.session import current
from live_tensors import LiveTensors
from rank_gang import GangFailed, run_gang

SEQ, SEQUENCES = 32, 8
MODEL = {"layers": 4, "dim": 64, "ffn_dim": 96, "heads": 8, "kv_heads": 4, "vocabulary": 68, "max_seq": 64}


class Patterns:
    """Sequences of a few documents each, made from (step, number) alone; there is something to learn."""

    def __init__(self, described: TrainJob) -> None:
        self._job = described

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        seq = self._job.at(step).seq
        tokens = np.empty((stop - start, seq + 1), np.int64)
        documents = np.zeros((stop - start, seq), np.int32)
        positions = np.empty((stop - start, seq), np.int64)
        for row in range(stop - start):
            chance = np.random.default_rng([step, start + row])
            tokens[row] = np.cumsum(chance.integers(0, 3, seq + 1)) % MODEL["vocabulary"]
            for cut in chance.integers(1, seq, 2)[: (start + row) % 3]:
                documents[row, cut:] += 1
            starts = np.flatnonzero(np.diff(documents[row], prepend=-1))
            positions[row] = np.arange(seq) - np.repeat(starts, np.diff(starts, append=seq))
        return Batch(tokens, documents, positions)


class Counting:
    """A text of documents that count, each from another number in steps of its own."""

    digest, bad, bos, eos, vocabulary = "", 0, 64, 65, 66
    hashes: NDArray[np.uint64] | None = None

    def __init__(self, source: str, documents: int, stride: int) -> None:
        self.source, self._stride = source, stride
        self.lengths = np.arange(documents) * 5 % 37 + 3

    def read(self, document: int, start: int, stop: int) -> Tokens:
        return (document + self._stride * np.arange(start, stop)) % 64


def evaluation(trainer: Trainer) -> dict[str, float]:
    """By source, over 7 sequences at most; that it leaves gradients alone is looked at, too."""
    texts = [Counting("a", 40, 1), Counting("b", 9, 3)]
    text = Corpus(texts, source="", seed=1, seq=SEQ, sequences_per_step=1, weights={"a": 3, "b": 1})
    assert [min(7, stream.samples_per_epoch) for stream in text.streams] == [7, 5]
    trainer.state.grads.fill_(math.nan)
    found = Evaluator(trainer, text, sequences=7).evaluate()
    assert bool(trainer.state.grads.isnan().all())
    assert found.step == trainer.state.step
    assert found.loss == 0.75 * found.by_source["a"] + 0.25 * found.by_source["b"]
    return dict(found.by_source)


def sizes(request: dict[str, Any]) -> dict[str, int]:
    """dp x pp x tp, or dp x pp x cp x tp."""
    *outer, tp = request["layout"]
    return dict(zip(("dp", "pp", "cp", "tp"), (*outer, *[1] * (3 - len(outer)), tp), strict=True))


def job(request: dict[str, Any]) -> TrainJob:
    return TrainJob.parse(
        {
            "job": "test",
            "layout": sizes(request),
            "pipeline": request.get("pipeline"),
            "numerics": request.get("numerics"),
            "virtual_dp": request.get("replicas"),
            "model": {**MODEL, **request.get("model", {})},
            "steps": request["steps"],
            "batch": {
                "global_tokens": SEQ * SEQUENCES,
                "seq": SEQ,
                "stages": request.get("stages"),
                **request.get("batch", {}),
            },
            "optimizer": {"lr": 3e-3, "warmup_steps": 3},
            "timeout_s": request.get("timeout_s", 30),
        }
    )


def train(request: dict[str, Any]) -> dict[str, Any]:
    """On one rank."""
    described = job(request)
    device = torch.device("cpu")
    groups = parallel.join(described.layout, device, timeout_s=described.timeout_s)
    trainer = Trainer(
        described,
        groups,
        Patterns(described),
        device=device,
        session=current(),
        ahead=request.get("ahead"),
    )
    if request.get("sabotage") == "norm-gradients":
        trainer.optimizer.gradients.groups = parallel.Groups(layout=groups.layout, rank=groups.rank)
    folder = Path(request.get("checkpoint", ""))
    beside = parallel.beside(groups, timeout_s=30)
    if "restore" in request:
        at = Point(step=Step(request["restore"]), attempt=Attempt(1))
        load(folder, at, trainer.state, model=described.shape, group=beside)
    else:
        initialise(trainer.state, described.shape, seed=0)
    trainer.optimizer.publish()
    memory = memory_of(trainer) if request.get("memory") else {}
    updates = [trainer.step() for _ in range(trainer.state.step, request.get("stop_at", described.steps))]
    validation = {} if "batch" in request else evaluation(trainer)  # its text is short
    if "stop_at" in request:
        identity = Identity(job="test", attempt=1, layout=described.layout, model=described.shape)
        saver = Saver(folder, trainer.state, identity, group=beside, session=current())
        saver.save(trainer.state.step, tokens=0, data={})
        assert saver.close(30) == trainer.state.step
    digest = digest_of(trainer)
    parallel.leave()
    return {
        "losses": [update.loss for update in updates],
        "norms": [update.grad_norm for update in updates],
        "validation": validation,
        "weights": digest,
        "place": str(groups.at.pp) + str(groups.at.tp),
        **memory,
    }


def memory_of(trainer: Trainer) -> dict[str, Any]:
    """Bytes of tensors that live beside the buffers in a step at most, and what was expected."""
    with LiveTensors() as live:
        trainer.step()
    return {"live": live.most, "expected": asdict(trainer.expected()), "held": asdict(trainer.held())}


def digest_of(trainer: Trainer) -> str:
    """Of all weights of this rank's part of the model, whoever owns them and however they are cut."""
    found: dict[str, bytes] = {}
    for unit in trainer.state.index.units:
        trainer.optimizer.weights.gather(unit)
        for parameter in unit.parameters:
            found[parameter.name] = (
                trainer.state.weight(parameter.name).view(-1).view(torch.uint8).numpy().tobytes()
            )
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def whole_program(request: dict[str, Any]) -> dict[str, Any]:
    """What `python -m keepstep.llama` does on one rank, its output caught."""
    rank = int(os.environ["RANK"])
    folder = Path(request["main"])
    os.environ["KEEPSTEP_JOB_FILE"] = str(folder / "job.json")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error-{rank}.json")
    if rank == request.get("term_rank"):
        step = Trainer.step

        def told_to_stop(trainer: Trainer, asks: Sequence[bool] = (), **more: Any) -> Update:
            if trainer.state.step == request["term_step"]:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, asks, **more)

        Trainer.step = told_to_stop  # type: ignore[assignment]
    out, errors, before = io.StringIO(), io.StringIO(), set(sys.modules)
    with redirect_stdout(out), redirect_stderr(errors):
        code = main_of_trainer()
    # Neither a rank nor its standby should have these: they take as long to import as half of torch.
    heavy = {"sympy", "torch._dynamo", "torch.distributed.checkpoint"} & set(sys.modules)
    imported = sorted(set(sys.modules) - before | heavy)
    return {"code": code, "out": out.getvalue(), "errors": errors.getvalue(), "imported": imported}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    world_size = math.prod(request["layout"])
    try:
        if "main" in request:
            return {"ranks": run_gang(world_size, lambda: whole_program(request))}
        ranks = run_gang(world_size, lambda: train(request), deadline_s=2 * request.get("timeout_s", 30))
    except GangFailed as error:
        return {"error": str(error)}
    if request.get("memory"):
        return {"ranks": ranks}
    first = ranks[0]
    for rank in ranks:
        assert rank["losses"] == first["losses"]
        assert rank["norms"] == first["norms"]
        assert rank["validation"] == first["validation"]
    weights: dict[str, str] = {}
    for rank in ranks:  # replicas must agree
        if weights.setdefault(rank["place"], rank["weights"]) != rank["weights"]:
            return {"error": f"replicas of {rank['place']} differ"}
    told = {name: first[name] for name in ("losses", "norms", "validation")}
    return {**told, "weights": weights}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
