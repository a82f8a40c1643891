"""What every store promises, whatever database is under it. Who may write it: test_store_lease.py."""

import math
import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from keepstep.core.clock import ManualClock
from keepstep.core.errors import InputError, NotFound, Refused, Unauthorized
from keepstep.core.ids import Attempt, Node, Step
from keepstep.store import Store, Writer, this_process
from keepstep.store.rows import CurvePoint, Evaluation, Job, NewEvent


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(store_url: str, clock: ManualClock) -> Iterator[Store]:
    opened = Store.open(store_url, clock=clock, chance=random.Random(7))
    opened.acquire(this_process())
    yield opened
    opened.close()


def add_job(
    store: Store, name: str = "llama", *, project: str = "default", principal: str = "", reason: str = ""
) -> Job:
    with store.transaction() as write:
        return write.add_job(
            name=name, spec={"run": {"command": ["true"]}}, pool="local",
            project=project, principal=principal, reason=reason,
        )  # fmt: skip


def add_attempt(write: Writer, job: Job, number: int) -> None:
    write.add_attempt(
        job=job.id, number=number, nodes=[Node("a"), Node("b")], layout={"dp": 2}, state="placed"
    )


def point(step: int, *, attempt: int = 1, loss: float = 2.0) -> CurvePoint:
    return CurvePoint(
        attempt=Attempt(attempt), step=Step(step), at=1.0, loss=loss, grad_norm=1.0, tokens_per_s=1e3,
        tflops=0.1, mfu=math.nan,
    )  # fmt: skip


# transactions


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    job = add_job(store)
    with pytest.raises(RuntimeError, match="in the middle"), store.transaction() as write:
        write.update_job(job.id, state="running")
        add_attempt(write, job, 1)
        write.add_event(NewEvent(kind="test", text="never", job=job.id))
        raise RuntimeError("in the middle")
    assert store.job(job.id) == job
    assert store.attempts(job.id) == []
    assert store.last_event() == 0


def test_a_writer_reads_what_it_wrote_and_others_do_not_yet(store: Store) -> None:
    job = add_job(store)
    with store.transaction() as write:
        write.update_job(job.id, state="running")
        assert write.job(job.id).state == "running"
        assert store.job(job.id).state == "queued"
    assert store.job(job.id).state == "running"


def test_transactions_do_not_nest(store: Store) -> None:
    with pytest.raises(AssertionError), store.transaction(), store.transaction():
        pass
    with store.transaction() as write:  # and nothing is stuck afterwards
        write.add_event(NewEvent(kind="test", text="goes on"))


def test_threads_may_write_at_once(store: Store) -> None:
    def submit() -> None:
        for _ in range(10):
            add_job(store)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [job.number for job in store.unfinished_jobs()] == list(range(1, 41))


# jobs and attempts


def test_rows_survive_closing(store: Store, store_url: str, clock: ManualClock) -> None:
    job = add_job(store, project="vision", principal="ada", reason="waits for nodes")
    with store.transaction() as write:
        add_attempt(write, job, 1)
        write.upsert_node("a", slots=4, labels={"rack": "r1"}, gpus=[{"uuid": "GPU-1"}])
    before = store.job(job.id), store.attempts(job.id), store.nodes()
    store.close()
    again = Store.open(store_url, clock=clock)
    assert (again.job(job.id), again.attempts(job.id), again.nodes()) == before
    assert not again.fresh
    assert before[0].project == "vision"
    assert before[0].attempt == 1
    assert before[1][0].nodes == ("a", "b")
    again.close()


def test_ids_are_unique_also_when_chance_repeats_itself(store_url: str, clock: ManualClock) -> None:
    class Stuck(random.Random):
        """Chooses the same four letters many times over."""

        calls = 0

        def choice(self, seq):  # type: ignore[no-untyped-def]
            self.calls += 1
            return seq[self.calls // 12 % len(seq)]

    store = Store.open(store_url, clock=clock, chance=Stuck())
    store.acquire(this_process())
    assert len({add_job(store).id for _ in range(5)}) == 5
    store.close()


def test_a_job_is_found_as_people_name_it(store: Store) -> None:
    first, other, second = add_job(store, "llama"), add_job(store, "bert"), add_job(store, "llama")
    assert store.job(first.id) == first
    assert store.job("llama") == second
    assert store.job("@last") == second
    assert store.job(other.id[:-2]) == other
    with pytest.raises(InputError, match="more than one"):
        store.job("llam")
    with pytest.raises(NotFound, match="Did you mean llama"):
        store.job("lama")
    for nobody in ("", "%", "_", "nothing like it"):
        with pytest.raises(NotFound):
            store.job(nobody)


def test_a_project_sees_its_own_jobs_only(store: Store) -> None:
    mine = add_job(store, "mine", project="a")
    add_job(store, "theirs", project="b")
    assert store.job("@last", project="a") == mine
    with pytest.raises(NotFound):
        store.job("theirs", project="a")
    assert store.jobs(project="a").items == (mine,)


def test_jobs_are_paged_newest_first(store: Store) -> None:
    numbers = [add_job(store, f"job{k}").number for k in range(7)]
    with store.transaction() as write:
        write.update_job(store.job("job3").id, state="failed", finished_at=write.now)
    seen, after = [], None
    for _ in range(10):
        page = store.jobs(limit=3, after=after)
        assert len(page.items) <= 3
        seen += [job.number for job in page.items]
        after = page.next
        if after is None:
            break
    assert seen == sorted(numbers, reverse=True)
    assert [job.name for job in store.jobs(states=["failed"]).items] == ["job3"]
    assert store.jobs(states=[]).items == ()
    assert len(store.unfinished_jobs()) == 6


def test_attempts_are_numbered_without_gap_or_repeat(store: Store) -> None:
    job = add_job(store)
    with store.transaction() as write:
        add_attempt(write, job, 1)
    for wrong in (1, 3):
        with pytest.raises(Refused, match="cannot be ordered"), store.transaction() as write:
            add_attempt(write, job, wrong)
    with store.transaction() as write:
        write.add_attempt(
            job=job.id, number=2, nodes=[Node("a")], spares=[Node("c")], layout={}, state="placed",
            parent=(1, 60),
        )  # fmt: skip
        write.update_attempt(job.id, 1, state="ended", outcome="crashed", ended_at=write.now)
    one, two = store.attempts(job.id)
    assert (one.outcome, two.parent_attempt, two.parent_step, two.term) == ("crashed", 1, 60, store.term)
    assert two.spares == ("c",)
    assert store.job(job.id).attempt == 2
    with pytest.raises(NotFound), store.transaction() as write:
        write.update_attempt(job.id, 9, state="ended")


def test_what_does_not_exist_is_not_written(store: Store) -> None:
    with pytest.raises(NotFound), store.transaction() as write:
        write.update_job("nobody-abcd", state="running")
    with pytest.raises(sa.exc.IntegrityError), store.transaction() as write:
        write.add_points("nobody-abcd", [point(1)])
    for ask in (lambda: store.incident(1), lambda: store.decision(1), lambda: store.node("a")):
        with pytest.raises(NotFound):
            ask()


# curves and checkpoints


def test_points_are_added_once(store: Store) -> None:
    job = add_job(store)
    with store.transaction() as write:
        write.add_points(job.id, [point(1, loss=2.5), point(2, loss=math.nan)])
    with store.transaction() as write:
        write.add_points(job.id, [point(1, loss=9.9), point(3), point(3)])
        write.add_points(job.id, [])
    curve = store.points(job.id).items
    assert [(p.step, p.loss) for p in curve] == [(1, 2.5), (2, None), (3, 2.0)]
    assert curve[0].mfu is None
    assert store.newest_step(job.id) == 3


def test_evaluations_are_added_once_and_read_from_the_newest(store: Store) -> None:
    job = add_job(store)

    def found(step: int, at: float, **losses: float) -> list[Evaluation]:
        return [
            Evaluation(attempt=Attempt(1), step=Step(step), source=source, at=at, loss=loss)
            for source, loss in {"": 2.0, **losses}.items()
        ]

    with store.transaction() as write:
        write.add_evaluations(job.id, found(10, 1.0, code=1.5, web=2.5))
        write.add_evaluations(job.id, found(20, 2.0, code=math.nan))
        write.add_evaluations(job.id, found(10, 3.0, code=9.9))  # told again by an agent that started anew
    told = [(e.step, e.source, e.loss) for e in store.evaluations(job.id)]
    assert told == [(20, "", 2.0), (20, "code", None), (10, "", 2.0), (10, "code", 1.5), (10, "web", 2.5)]
    assert len(store.evaluations(job.id, limit=2)) == 2


def test_a_page_of_points_never_ends_inside_a_step(store: Store) -> None:
    job = add_job(store)
    all_of_them = [(step, attempt) for step in range(20) for attempt in (1, 2, 3)]
    with store.transaction() as write:
        write.add_points(job.id, [point(step, attempt=attempt) for step, attempt in all_of_them])
    for limit in (1, 2, 4, 7, 1000):
        seen, after = [], -1
        for _ in range(100):
            page = store.points(job.id, after_step=after, limit=limit)
            seen += [(p.step, p.attempt) for p in page.items]
            if page.next is None:
                break
            after = page.next
        assert seen == all_of_them, limit
    assert {p.attempt for p in store.points(job.id, attempt=2).items} == {2}


def test_checkpoints_become_complete_and_go(store: Store) -> None:
    job = add_job(store)
    with store.transaction() as write:
        write.add_checkpoints(job.id, [(1, 10, True), (1, 20, False)])
    with store.transaction() as write:
        write.add_checkpoints(job.id, [(1, 20, True), (2, 30, False)])
        write.drop_checkpoints(job.id, [(1, 10)])
    found = [(c.attempt, c.step, c.complete) for c in store.checkpoints(job.id)]
    assert found == [(1, 20, True), (2, 30, False)]


# nodes


def test_a_report_of_a_node_leaves_its_life_alone(store: Store, clock: ManualClock) -> None:
    life: dict[str, Any] = {"state": "cordoned", "owner": "ada", "reason": "fans", "revision": 3}
    with store.transaction() as write:
        write.upsert_node("a", slots=4, state="ready")
        write.save_life("a", **{**life, "revision": 2}, data={})
        write.save_life("a", **life, data={"node": "a", "counts": {"xid 48|G": 2}})
    clock.advance(60)
    with store.transaction() as write:
        node = write.upsert_node("a", instance="i2", addresses=["10.0.0.1"])
    assert (node.slots, node.instance) == (4, "i2")
    [row] = store.lives()
    assert (row.state, row.owner, row.reason, row.revision) == ("cordoned", "ada", "fans", 3)
    assert row.data["counts"] == {"xid 48|G": 2}
    assert node.last_seen - node.first_seen == 60
    with pytest.raises(NotFound, match="Did you mean node-17"):
        with store.transaction() as write:
            write.upsert_node("node-17")
        store.node("node-71")


# what happened


def test_an_incident_names_those_like_it(store: Store) -> None:
    one, two = add_job(store, "one"), add_job(store, "two")

    def open_incident(job: Job, verdict: str, node: str, rank: int) -> tuple[int, tuple[int, ...]]:
        with store.transaction() as write:
            incident = write.add_incident(
                job=job.id, attempt=1, verdict=verdict, culprit={"node": node, "rank": rank}
            )
        return incident.id, incident.same_before

    first, before = open_incident(one, "crashed", "a", 3)
    assert before == ()
    assert open_incident(one, "hung", "a", 3)[1] == ()
    same_node, before = open_incident(two, "crashed", "a", 0)
    assert before == (first,)
    same_rank, before = open_incident(one, "crashed", "b", 3)
    assert before == (first,)
    assert open_incident(one, "crashed", "a", 3)[1] == (first, same_node, same_rank)


def test_an_incident_its_decision_and_its_events_hang_together(store: Store, clock: ManualClock) -> None:
    job = add_job(store, project="vision")
    with store.transaction() as write:
        add_attempt(write, job, 1)
        incident = write.add_incident(job=job.id, attempt=1, verdict="crashed", evidence={"exit": -9})
        decision = write.add_decision(
            job=job.id, kind="recover", reason="rank 3 died", rejected=[{"rung": "requeue"}],
            plan={"rung": "in place"}, slice={"ranks": 4},
        )  # fmt: skip
        write.update_incident(incident.id, decision=decision.id, decided_at=write.now, state="recovering")
        write.add_events(
            NewEvent(kind="incident", text=text, job=job.id, incident=incident.id) for text in ("a", "b")
        )
    found = store.incident(incident.id)
    assert (found.decision, found.project, found.evidence) == (decision.id, "vision", {"exit": -9})
    assert store.decision(decision.id).term == store.term
    assert store.decisions(job.id).items[0].rejected == [{"rung": "requeue"}]
    assert [(e.text, e.project, e.at) for e in store.events(job=job.id).items] == [
        ("a", "vision", clock.wall()),
        ("b", "vision", clock.wall()),
    ]
    assert store.incidents(job=job.id, states=["recovering"]).items == (found,)


def test_the_timeline_is_read_in_bounded_pages_without_a_gap(store: Store) -> None:
    job = add_job(store)
    with store.transaction() as write:
        for k in range(1, 1206):
            write.add_event(NewEvent(kind="test", text=str(k), job=job.id if k % 2 else None))
    assert len(store.events(limit=10**9).items) == 1000
    assert len(store.events(limit=0).items) == 1
    seen, after = [], 0
    for _ in range(10):
        page = store.events(after=after, limit=300)
        seen += [int(event.text) for event in page.items]
        if page.next is None:
            break
        after = page.next
    assert seen == list(range(1, 1206))
    assert [e.text for e in store.events(after=store.last_event()).items] == []
    assert len(store.events(job=job.id, limit=1000).items) == 603


# tokens


def test_secrets_are_never_stored(store: Store, store_url: str) -> None:
    join = store.tokens.issue(name="rack", kind="join", uses=1)
    secrets = [
        store.tokens.issue(name="ada", role="admin").secret,
        join.secret,
        store.tokens.join(join.secret, "a").secret,
    ]
    store.beat()
    assert all(secret.startswith("ks_") and len(secret) > 40 for secret in secrets)
    if store_url.startswith("sqlite"):
        folder = Path(str(sa.make_url(store_url).database)).parent
        kept = b"".join(file.read_bytes() for file in folder.iterdir())
        assert b"rack" in kept
        assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())
    else:
        engine = sa.create_engine(store_url)
        with engine.connect() as connection:
            kept = repr(connection.execute(sa.text("SELECT * FROM tokens")).all()).encode()
        engine.dispose()
    for secret in secrets:
        assert secret.encode() not in kept
        assert secret[-20:].encode() not in kept
        assert secret not in repr(join)


def test_roles_hold_those_below_them(store: Store) -> None:
    token = store.tokens.verify(store.tokens.issue(name="ops", role="operator").secret)
    assert [token.allows(role) for role in ("viewer", "submitter", "operator", "admin")] == [
        True, True, True, False,
    ]  # fmt: skip
    join = store.tokens.verify(store.tokens.issue(name="rack", kind="join").secret)
    assert not join.allows("viewer")
    with pytest.raises(InputError):
        store.tokens.issue(name="nobody")


def test_tokens_end(store: Store, clock: ManualClock) -> None:
    tokens = store.tokens
    short_lived = tokens.issue(name="ci", role="viewer", ttl_s=60)
    revoked = tokens.issue(name="ada", role="viewer")
    replaced = tokens.issue(name="local", role="admin", replace=True)
    present = tokens.issue(name="local", role="admin", replace=True)
    assert tokens.verify(short_lived.secret).name == "ci"
    clock.advance(61)
    assert [token.name for token in tokens.revoke("ada")] == ["ada"]
    for issued in (short_lived, revoked, replaced):
        with pytest.raises(Unauthorized):
            tokens.verify(issued.secret)
    for wrong in ("", "ks_", present.secret[:-1], present.secret + "x"):
        with pytest.raises(Unauthorized):
            tokens.verify(wrong)
    assert tokens.verify(present.secret) == present.token
    assert [token.name for token in tokens.list()] == ["local"]
    assert len(tokens.list(all=True)) == 4
    with pytest.raises(NotFound):
        tokens.revoke("ada")


def test_last_use_is_written_with_the_beat(store: Store, clock: ManualClock) -> None:
    issued = store.tokens.issue(name="ada", role="viewer")
    clock.advance(5)
    store.tokens.verify(issued.secret)
    assert store.tokens.list()[0].last_used_at is None
    store.beat()
    assert store.tokens.list()[0].last_used_at == clock.wall()


def test_a_join_token_makes_as_many_nodes_as_it_has_uses(store: Store) -> None:
    join = store.tokens.issue(name="rack", kind="join", uses=2, project="p").secret
    agent = store.tokens.join(join, "a")
    assert (agent.token.kind, agent.token.node, agent.token.project) == ("agent", "a", "p")
    assert store.tokens.verify(agent.secret).node == "a"
    with pytest.raises(Refused, match="joined already"):
        store.tokens.join(join, "a")  # costs no use
    again = store.tokens.join(join, "a", replace=True)
    with pytest.raises(Unauthorized):
        store.tokens.verify(agent.secret)
    assert store.tokens.verify(again.secret).node == "a"
    with pytest.raises(Unauthorized):
        store.tokens.join(join, "b")
    with pytest.raises(Unauthorized):
        store.tokens.join(again.secret, "b")


# the database itself


def test_a_full_disk_is_said_as_it_is(store: Store, store_url: str) -> None:
    if not store_url.startswith("sqlite"):
        pytest.skip("needs a quota")
    job = add_job(store)
    database = str(sa.make_url(store_url).database)
    with sqlite3.connect(database) as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.close()
    with pytest.raises(Exception, match="full") as failed, store.transaction() as write:
        write._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        write.add_event(NewEvent(kind="test", text="x" * 4_000_000, job=job.id))
    assert type(failed.value).__name__ == "Unreachable"
    assert store.job(job.id) == job
