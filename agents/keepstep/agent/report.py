"""How an attempt is reported: ranks from shim, beacon and evidence; and its end, which is kept and aged."""

import signal
from collections.abc import Iterable, Mapping

import msgspec

from keepstep.agent.evidence import Evidence
from keepstep.agent.pulse import Pulse
from keepstep.agent.rank.protocol import RankState
from keepstep.core.beacon import Record, age_s
from keepstep.wire.messages import AttemptStatus, RankStatus

_EVIDENCE_RANKS = 8  # the first failures of a node; the others fell over them


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an attempt on this node, as outcome.json keeps it."""

    boot: str
    at: float  # monotonic, of that boot
    status: AttemptStatus

    def aged(self, now: float, boot: str) -> AttemptStatus:
        """As it is to be reported now; ages of another boot mean nothing."""
        passed = max(0.0, now - self.at) if boot == self.boot else None
        ranks = tuple(
            msgspec.structs.replace(
                rank,
                exited_age_s=_later(rank.exited_age_s, passed),
                step_age_s=_later(rank.step_age_s, passed),
                phase_age_s=_later(rank.phase_age_s, passed),
            )
            for rank in self.status.ranks
        )
        return msgspec.structs.replace(self.status, ranks=ranks)


def rank_status(
    state: RankState,
    record: Record | None,
    evidence: Evidence | None,
    pulse: Pulse | None,
    now_ns: int,
    gpu: str = "",
) -> RankStatus:
    record = record or Record()
    pulse = pulse if state.state == "running" else None
    spent = pulse.spent if pulse else None
    moved = pulse is not None and pulse.counter != record.sequence  # since the last look
    evidence = evidence or Evidence()
    return RankStatus(
        rank=state.rank,
        local_rank=state.local_rank,
        state="exited" if state.state == "lost" else state.state,
        pid=state.pid or 0,
        exit_code=state.exit_code,
        signal=signal_number(state.signal),
        exited_age_s=None if state.exited_ns is None else age_s(state.exited_ns, now_ns),
        exit_order=state.order or 0,
        step=record.step,
        step_age_s=age_s(record.step_ns, now_ns),
        phase=record.phase.name.lower() if record.sequence else "",
        phase_age_s=age_s(record.phase_ns, now_ns),
        micro_batch=record.micro_batch,
        counter=record.sequence,  # every mark moves it
        checkpoint_step=record.checkpoint_step,
        snapshot_step=record.snapshot_step,
        process=pulse.process if pulse else "",
        process_s=pulse.process_s if pulse else 0.0,
        still_s=None if pulse is None else 0.0 if moved else pulse.still_s,
        stall_s=record.stall_ns / 1e9,
        waiting_s=age_s(record.waiting_ns, now_ns),
        wait_s=record.wait_ns / 1e9,
        group=record.group,
        group_sequence=record.group_sequence,
        peer=record.peer,
        launched=record.launched,
        completed=record.completed,
        batches=record.batches,
        passed_s=None if spent is None else spent.passed_s,
        own_s=spent.own_s if spent else 0.0,
        data_s=spent.data_s if spent else 0.0,
        starved_s=spent.starved_s if spent else 0.0,
        trouble=record.trouble.name.lower() if record.trouble else "",
        trouble_step=record.trouble_step if record.trouble else -1,
        error=evidence.error,
        last_lines=evidence.last_lines,
        gpu=gpu,
    )


def waiting(ranks: Iterable[int]) -> tuple[RankState, ...]:
    return tuple(RankState(rank=rank, local_rank=k) for k, rank in enumerate(ranks))


def lost(ranks: Iterable[int]) -> tuple[RankState, ...]:
    """They are gone, and nobody saw how they ended."""
    return tuple(RankState(rank=rank, local_rank=k, state="lost") for k, rank in enumerate(ranks))


def failed(state: RankState) -> bool:
    return state.state == "exited" and state.exit_code != 0


def worth_evidence(states: Iterable[RankState], known: Mapping[int, Evidence]) -> list[RankState]:
    """The first failures, by the order in which the ranks ended."""
    failures = sorted((s for s in states if failed(s)), key=lambda s: s.order or 0)
    return [state for state in failures[:_EVIDENCE_RANKS] if state.rank not in known]


def signal_number(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return int(signal.Signals[name])
    except KeyError:
        return int(name.removeprefix("SIG")) if name.removeprefix("SIG").isdecimal() else 0


def how_it_ended(state: RankState) -> str:
    if state.signal is not None:
        return f"was ended by {state.signal}"
    if state.exit_code is not None:
        return f"exited with {state.exit_code}"
    return "is gone"


def _later(age: float | None, passed: float | None) -> float | None:
    return None if age is None or passed is None else age + passed
