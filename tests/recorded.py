"""What agents saw of real runs, judged again as a controller would judge it now.

tests/recordings has them: two ranks each, of libraries whose scripts are unchanged, with evaluations,
checkpoints and data that stall (tests/bench/scripts/record.py made them and says what is in them). At each
look at which no rank has moved for a second the whole judge is asked, with the histograms as they were. It
gets what its close looks would bring at the worst: stacks that can be read, and that show nothing special.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepstep.core.beacon import BINS
from keepstep.core.durations import Usual
from keepstep.core.ids import Attempt, JobId, Node, Rank
from keepstep.core.states import AttemptState, JobState
from keepstep.decide.hung import Suspicion
from keepstep.decide.judge import judge
from keepstep.decide.plan import Policy, Verdict
from keepstep.decide.view import (
    AttemptView,
    Examined,
    Finding,
    JobView,
    NodeView,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
)
from keepstep.spec import load

FOLDER = Path(__file__).parent / "recordings"
POLICY = Policy()
STILL_S, LOOK_S = 1.0, 0.25
SILENT_MAX_S = 14.0  # from 15 s on a gang that stands is given up, whatever is usual
SPEC = load(
    "{name: j, resources: {nodes: 2, gpus_per_node: 1}, run: {command: [python, train.py], ship: none}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One look: each rank's phase, step and counter, and for how long that has been so."""

    at_s: float
    ranks: tuple[tuple[str, int, int], ...]
    still_s: tuple[float, ...]
    step_age_s: float
    usual: dict[str, Usual]


def recordings() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def moments(path: Path) -> Iterator[Moment]:
    """From the time on when both ranks have stepped."""
    moved: dict[int, tuple[int, float]] = {}
    usual: dict[str, Usual] = {}
    stepped, step_s = -1, 0.0
    for at_s, ranks, *table in json.loads(path.read_bytes())["looks"]:
        if table:
            usual = {phase: _usual(*row) for phase, row in table[0].items()}
        for rank, (_, _, counter) in enumerate(ranks):
            if rank not in moved or moved[rank][0] != counter:
                moved[rank] = counter, at_s
        newest = max((step for _, step, _ in ranks), default=-1)
        if newest > stepped:
            stepped, step_s = newest, at_s
        if len(ranks) == 2 and all(step > 0 for _, step, _ in ranks):
            yield Moment(
                at_s=at_s,
                ranks=tuple((phase, step, counter) for phase, step, counter in ranks),
                still_s=tuple(at_s - moved[rank][1] for rank in range(len(ranks))),
                step_age_s=at_s - step_s,
                usual=usual,
            )


def _usual(count: int, origins: int, longest_s: float, bins: dict[str, int]) -> Usual:
    counts = tuple(bins.get(str(k), 0) for k in range(BINS))
    return Usual(count=count, origins=origins, longest_s=longest_s, bins=counts)


def asked(moment: Moment, silent: int | None = None) -> Verdict | None:
    """The verdict after as many close looks as are wanted. `silent`: whose node is not heard meanwhile."""
    parts = tuple(_part(Rank(rank), moment, heard=rank != silent) for rank in range(len(moment.ranks)))
    attempt = AttemptView(
        number=Attempt(1), state=AttemptState.RUNNING, layout=SPEC.parallelism, parts=parts,
        step=min(step for _, step, _ in moment.ranks), step_age_s=moment.step_age_s,
        progress_age_s=min(moment.still_s), stepped=True, step_every_s=1.0,
    )  # fmt: skip
    job = JobView(
        id=JobId("j"), spec=SPEC, state=JobState.RUNNING, attempt=attempt, attempts=1, usual=moment.usual
    )
    nodes = {part.node: NodeView(name=part.node, pool="p", slots=1) for part in parts}
    if silent is not None:
        node = parts[silent].node
        silence_s = min(moment.still_s[silent], SILENT_MAX_S)
        nodes[node] = replace(nodes[node], connected=False, silence_s=silence_s)
    found = judge(job, attempt, nodes, POLICY, returned=True)
    if isinstance(found, Suspicion):
        findings = tuple(
            Finding(rank=Rank(rank), process="running", stack=("train.py:1 main",))
            for rank in range(len(moment.ranks))
        )
        look = Examined(attempt=Attempt(1), age_s=0.0, findings=findings)
        found = judge(replace(job, examined=(look, look)), attempt, nodes, POLICY, returned=True)
    return found if isinstance(found, Verdict) else None


def _part(rank: Rank, moment: Moment, *, heard: bool) -> PartView:
    phase, step, counter = moment.ranks[rank]
    view = RankView(
        rank=rank, phase=RankPhase.RUNNING, step=step, doing=phase, process="running", counter=counter,
        still_s=moment.still_s[rank] if heard else None,
    )  # fmt: skip
    return PartView(node=Node(f"n{rank}"), phase=PartPhase.RUNNING, heard=heard, alive=1, ranks=(view,))


def kills(path: Path) -> list[tuple[float, Verdict]]:
    """When somebody would have been ended, and why: with everybody heard, and with a node silent."""
    found = []
    for moment in moments(path):
        if min(moment.still_s) >= STILL_S:
            verdicts = [asked(moment, silent) for silent in (None, 0, 1)]
            found += [(moment.at_s, verdict) for verdict in verdicts if verdict is not None]
    return found


def hung(path: Path, phase: str) -> Verdict:
    """The recording's end, from where no rank moves any more, each of them in this phase."""
    *_, last = moments(path)
    for look in range(1, 1 << 14):
        still_s = look * LOOK_S
        ranks = tuple((phase, step, counter) for _, step, counter in last.ranks)
        stands = replace(last, ranks=ranks, still_s=(still_s,) * len(ranks), step_age_s=still_s)
        if (verdict := asked(stands)) is not None:
            return replace(verdict, began_s=still_s)
    raise AssertionError(f"{path.name}: for ever in {phase}, and nobody minds")


def spans(path: Path) -> dict[str, Any]:
    """What the recording holds: its seconds and steps, and how long nobody moved at the longest."""
    *_, last = seen = list(moments(path))
    return {
        "seconds": round(last.at_s, 1),
        "steps": max(step for _, step, _ in last.ranks),
        "still_s_max": round(max(min(moment.still_s) for moment in seen), 1),
    }
