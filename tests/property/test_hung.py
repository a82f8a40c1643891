"""What must hold of verdicts on hangs, whatever a gang looks like: safety properties, by their names."""

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from golden.decide_script import spec_of
from keepstep.core.beacon import BINS, Phase, bin_of
from keepstep.core.durations import COMPUTING_FLOOR_S, HELD_S, Usual, bound_s
from keepstep.core.ids import Attempt, JobId, Node, Rank
from keepstep.core.layout import Layout, local_ranks
from keepstep.core.states import AttemptState, JobState
from keepstep.decide.hung import Suspicion, hung
from keepstep.decide.plan import Pending, Policy, Verdict
from keepstep.decide.view import (
    AttemptView,
    Examined,
    Finding,
    JobView,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
)
from keepstep.decide.waits import blame

PROFILE = settings(max_examples=150, derandomize=True, deadline=None, database=None)
POLICY = Policy()
PHASES = [phase.name.lower() for phase in Phase]

usuals = st.builds(
    lambda count, seconds: Usual(
        count=count,
        origins=4,
        longest_s=seconds,
        bins=tuple(count if k == bin_of(round(seconds * 1e9)) else 0 for k in range(BINS)),
    ),
    count=st.integers(0, 5000),
    seconds=st.floats(0.001, 300.0),
)
ranks = st.builds(
    RankView,
    rank=st.just(Rank(0)),
    phase=st.just(RankPhase.RUNNING),
    step=st.integers(0, 3),
    doing=st.sampled_from(PHASES),
    process=st.sampled_from(
        ["running", "running", "running", "stopped", "traced", "blocked", "zombie", "gone"]
    ),
    process_s=st.sampled_from([0.0, 0.1, 0.25, 3.0, 1000.0]),
    still_s=st.floats(0.0, 5000.0),
    counter=st.integers(0, 3),
    waiting_s=st.one_of(st.none(), st.just(1.0)),
    group=st.sampled_from(["", "dp", "pp", "world"]),
    group_sequence=st.integers(0, 3),
    peer=st.integers(-1, 3),
)
findings = st.builds(
    Finding,
    rank=st.integers(0, 3).map(Rank),
    interpreter=st.sampled_from(["answers", "stuck", "unknown"]),
    stack=st.sampled_from([(), ("train.py:1 step",), ("torch/_inductor/x.py:1 compile",)]),
)


def _job(
    four: list[RankView],
    step_age_s: float,
    state: AttemptState,
    script: bool,
    looks: list[tuple[float, list[Finding]]],
    usual: dict[str, Usual],
) -> JobView:
    spec = spec_of("j", {"script": "yes"} if script else {})
    numbered = [replace(rank, rank=Rank(k)) for k, rank in enumerate(four)]
    parts = tuple(
        PartView(
            node=Node(name),
            phase=PartPhase.RUNNING,
            heard=True,
            ranks=tuple(numbered[n] for n in local_ranks(4, 2, k)),
        )
        for k, name in enumerate("ab")
    )
    attempt = AttemptView(
        number=Attempt(1),
        state=state,
        layout=spec.parallelism,
        parts=parts,
        step=1,
        step_age_s=step_age_s,
        stepped=state is AttemptState.RUNNING,
    )
    return JobView(
        id=JobId("j"),
        spec=spec,
        state=JobState.RUNNING,
        attempt=attempt,
        attempts=1,
        usual=usual,
        examined=tuple(
            Examined(attempt=Attempt(1), age_s=age_s, findings=tuple(found))
            for age_s, found in sorted(looks, key=lambda look: -look[0])
        ),
    )


gangs = st.builds(
    _job,
    four=st.lists(ranks, min_size=4, max_size=4),
    step_age_s=st.floats(0.0, 5000.0),
    state=st.sampled_from([AttemptState.PREPARING, AttemptState.STARTING, AttemptState.RUNNING]),
    script=st.booleans(),
    looks=st.lists(st.tuples(st.floats(0.0, 100.0), st.lists(findings, max_size=4)), max_size=2),
    usual=st.dictionaries(st.sampled_from(PHASES), usuals, max_size=6),
)


def judged(job: JobView) -> Verdict | Pending | Suspicion | None:
    assert job.attempt is not None
    return hung(job, job.attempt, POLICY)


def all_ranks(job: JobView) -> list[RankView]:
    assert job.attempt is not None
    return [rank for part in job.attempt.parts for rank in part.ranks]


@PROFILE
@given(gangs)
def test_a_stepping_gang_is_never_killed(job: JobView) -> None:
    assert job.attempt is not None
    moving = any((rank.still_s or 0.0) < COMPUTING_FLOOR_S for rank in all_ranks(job))
    if moving and job.attempt.step_age_s < HELD_S:
        assert not isinstance(judged(job), Verdict)


@PROFILE
@given(gangs)
def test_a_gang_with_a_traced_rank_is_never_killed(job: JobView) -> None:
    assert job.attempt is not None
    assume(any(rank.process == "traced" for rank in all_ranks(job)))
    assume(job.attempt.step_age_s >= HELD_S)
    assert not isinstance(judged(job), Verdict)


@PROFILE
@given(gangs)
def test_nothing_is_killed_while_it_is_prepared(job: JobView) -> None:
    assert job.attempt is not None
    if job.attempt.state is AttemptState.PREPARING:
        assert judged(job) is None


@PROFILE
@given(gangs)
def test_a_kill_has_evidence_or_an_exhausted_bound(job: JobView) -> None:
    found = judged(job)
    if not isinstance(found, Verdict):
        return
    by_rank = {rank.rank: rank for rank in all_ranks(job)}
    odd = by_rank[found.rank].process in {"stopped", "zombie", "gone"} if found.rank is not None else False
    still_s = min(rank.still_s or 0.0 for rank in all_ranks(job))
    exhausted = found.bound_s is not None and still_s >= found.bound_s
    assert odd or exhausted or "two close looks agree" in found.noticed, found


@PROFILE
@given(gangs)
def test_below_the_unknown_bound_only_known_phases_are_killed_in(job: JobView) -> None:
    found = judged(job)
    still_s = min(rank.still_s or 0.0 for rank in all_ranks(job))
    by_bound = (
        isinstance(found, Verdict) and found.bound_s is not None and "two close looks" not in found.noticed
    )
    if by_bound and still_s < job.spec.recovery.hang_after_unknown_s:
        assert isinstance(found, Verdict)
        doing = {rank.doing for rank in all_ranks(job) if found.rank in (None, rank.rank)}
        assert not doing & {"none", "unknown"} or found.rank is None
        assert any(bound_s(Phase[name.upper()], job.usual.get(name, Usual())) for name in doing)


@PROFILE
@given(gangs)
def test_a_wait_has_a_deadline_and_a_look_names_every_node(job: JobView) -> None:
    found = judged(job)
    if isinstance(found, Pending):
        assert found.due_s > 0 and found.reason
    if isinstance(found, Suspicion):
        assert found.nodes == ("a", "b")


@PROFILE
@given(st.lists(ranks, min_size=4, max_size=4), st.lists(findings, max_size=4))
def test_blame_always_ends_and_names_ranks_of_the_gang(four: list[RankView], found: list[Finding]) -> None:
    numbered = [replace(rank, rank=Rank(k)) for k, rank in enumerate(four)]
    named = blame(numbered, Layout(dp=2, pp=2), found)
    assert named.ranks and set(named.ranks) <= {rank.rank for rank in numbered} and named.why
