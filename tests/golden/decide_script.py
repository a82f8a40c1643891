"""The language of the scripts in tests/golden/decide: what is seen, line by line, and what is decided.

A line states something; what was said before stays until it is said anew. An indented line is an answer to
the question above it, written by `pytest --golden-rewrite` and read by a person.

    policy NAME=VALUE ...           bounds of the operator
    up SECONDS                      since this controller took its term (100 unless said)
    node NAMES [slots= silent= ready= state= confirmed= attached= warm= lingering=]
                [away reset leaving cordoned back] [life= drain= by= because=]
                [label=KEY:VALUE for=JOB]  one job's
    job ID [script] [nodes= gpus= labels= dp= pp= spares= min_dp= priority= fenced ...]
                    [state= wanted= wait= queued=]
                    [started=]                   how long its starts took
    attempt N STATE [on= spares= dp= step= step_age= age= still= progress= every= stored= waiting]
    part NODE PHASE [alive= master= reason= unheard]         its ranks follow the phase
    rank N running|waiting|exited [exit= signal= age= order= step= in= doing= error=]
           [trouble= after=STEP] [pace=STEP/OWN/DATA/WAITED/STARVED[/GARBAGE[/LEAST WAITED]]]
           [gpu=INDEX:MHZ[:LANESxGENERATION[:REASON+REASON]]]
           [process= held= still= wait=GROUP:SEQUENCE|rank:N]       as its agent found it
    losses STEP LOSS*TIMES ...      of the steps from there on
    told "SIGNATURE"=AGE ...        what was found in this attempt, and how long ago
    still SECONDS                   no counter of any rank has moved for so long
    usual PHASE SECONDS [count= odd=]       what the job has learnt of a phase; `odd`: one took so long
    look AGE [examining]            a close look began; what it found follows
    found N [process= kernel= interpreter= stack="INNERMOST, ..." groups="NAME:BEGUN/DONE:OP ..."]
            [links="LOCAL>PEER:RTT/LEAST[/UNANSWERED] ..."]
    ended N [on= spares= dp= how=]  the last attempt is over; the job recovers
    lineage 1 2<1@60 3<2@70!69 ...  attempt 2 began from attempt 1's step 60; 3 is good until step 69
    failure [age= blame= attempt= step= signature= node= rank= exit_code= error=]
    stored [1@60 ...] [from= after= error=]    what a node found in the checkpoint folder
    kept NODE [own] [stale] WORLD R@A.S ...   in a node's memory: ranks R of a gang of WORLD, attempt A, step
                                    (ranks 0-3; without own: buddies' copies; stale: said before the end);
                                    `kept NODE` alone: nothing
    saving A@S [age= done error=]   what was asked to be stored from memory, and what came of it
    newest STEP                     the newest checkpoint that the last attempt is known to have written
    asked NODE=AGE ...
    moment SECONDS KIND [attempt= slots= spare_slots= incident= seconds=]
questions:
    decide                          the plan
    memory                          the newest state that is whole in memory, who holds it, what is protected
    restore                         the point on the chain that the next attempt begins from
    observe PERIOD WORD ...         silence after ticks that took so many seconds, and `heard`
    ledger UNTIL
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from keepstep.core.beacon import BINS, bin_of
from keepstep.core.durations import Usual
from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.job import (
    Batch,
    Checkpoint,
    CommandRun,
    Elastic,
    JobSpec,
    LlamaRun,
    ModelShape,
    Optimizer,
    Recovery,
    Resources,
    Restarts,
)
from keepstep.core.layout import Layout, local_ranks
from keepstep.core.states import AttemptState, JobState, LifeState, NodeState
from keepstep.decide import plan as p
from keepstep.decide.account import Moment, ledger
from keepstep.decide.decide import decide
from keepstep.decide.restore import memory_point, protected_step, restore_point
from keepstep.decide.silence import Silence
from keepstep.decide.view import (
    RESERVED_FOR,
    Asked,
    AttemptView,
    Connected,
    Ended,
    Examined,
    Failure,
    Finding,
    Gpu,
    Inventory,
    JobView,
    Kept,
    Link,
    Measured,
    NodeView,
    Pace,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
    Recorded,
    Saving,
    Stored,
    View,
    Wanted,
)

MODEL = ModelShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocabulary=260)
Words = dict[str, str]


def spec_of(name: str, said: Words) -> JobSpec:
    """A small job; every figure can be said."""
    number: Callable[[str, int], int] = lambda key, default: int(said.get(key, default))  # noqa: E731
    seconds: Callable[[str, float], float] = lambda key, default: float(said.get(key, default))  # noqa: E731
    layout = Layout(dp=number("dp", 2), pp=number("pp", 2), tp=number("tp", 1))
    run: LlamaRun | CommandRun
    if "script" in said:
        run = CommandRun(command=("python", "train.py"), workdir="/code")
    else:
        run = LlamaRun(
            model=MODEL,
            steps=number("steps", 120),
            batch=Batch(global_tokens=256 * number("sequences", 4), seq=256),
            optimizer=Optimizer(lr=1e-3, min_lr=1e-4, warmup_steps=10),
        )
    return JobSpec(
        name=name,
        priority=number("priority", 0),
        resources=Resources(
            nodes=number("nodes", 2),
            gpus_per_node=number("gpus", 2),
            spares=number("spares", 0),
            labels=dict([said["labels"].split(":", 1)]) if "labels" in said else {},
        ),
        parallelism=layout,
        elastic=Elastic(min_dp=number("min_dp", layout.dp)),
        run=run,
        checkpoint=Checkpoint(
            dir=None if "script" in said and "dir" not in said else "/checkpoints",
            snapshot_every_steps=int(said["snapshots"]) if "snapshots" in said else None,
        ),
        recovery=Recovery(
            fenced="fenced" in said,
            self_fence_s=seconds("self_fence", 30.0),
            orphan_lease_s=seconds("orphan_lease", 1800.0),
            on_loss_spike=said.get("on_spike", "tell"),
            hang_after_s=float(said["hang_bound"]) if "hang_bound" in said else None,
            hang_after_unknown_s=seconds("hang_after", 600.0),
            restarts=Restarts(max=number("restarts", 20)),
        ),
    )


@dataclass
class Scene:
    """What a script has said so far."""

    policy: p.Policy = field(default_factory=p.Policy)
    up_s: float = 100.0
    nodes: dict[str, NodeView] = field(default_factory=dict)
    jobs: dict[str, JobView] = field(default_factory=dict)
    specs: dict[str, Words] = field(default_factory=dict)
    job: str = ""  # whom attempt, part, rank ... speak of
    part: int = 0
    moments: list[Moment] = field(default_factory=list)

    def run(self, line: str) -> list[str]:
        """One line; a question's answer."""
        verb, *words = shlex.split(line)
        flags = [word for word in words if "=" not in word]
        said: Words = dict.fromkeys(flags, "yes")
        for word in words:
            key, equals, value = word.partition("=")
            said |= {key: value} if equals else {}
        answer = getattr(self, f"on_{verb}")(flags, said)
        return answer if isinstance(answer, list) else []

    # ------------------------------------------------------------------ what is seen

    def on_policy(self, _: list[str], said: Words) -> None:
        kinds = {f.name: f.type for f in fields(p.Policy)}
        values: Any = {key: int(v) if kinds[key] in (int, "int") else float(v) for key, v in said.items()}
        self.policy = replace(self.policy, **values)

    def on_up(self, flags: list[str], _: Words) -> None:
        self.up_s = float(flags[0])

    def on_node(self, flags: list[str], said: Words) -> None:
        marks = {"away", "reset", "leaving", "left", "cordoned", "back"}
        for name in [flag for flag in flags if flag not in marks]:
            node = self.nodes.get(name) or NodeView(name=Node(name), pool="local", slots=2, ready_s=100.0)
            if "back" in said:
                node = replace(node, connected=True, silence_s=0.0, state=NodeState.READY, confirmed="")
            if "silent" in said:
                silence_s = float(said["silent"])
                late = silence_s >= self.policy.silent_after_s
                state = NodeState.SILENT if late else NodeState.READY
                node = replace(node, connected=False, silence_s=silence_s, state=state)
            more: dict[str, Any] = {}
            for key, convert in _NODE.items():
                if key in said:
                    field_name, value = convert(said[key])
                    more[field_name] = value
            self.nodes[name] = replace(node, **more)

    def on_job(self, flags: list[str], said: Words) -> None:
        self.job = name = flags[0]
        words = self.specs.setdefault(name, {})
        words |= {key: value for key, value in said.items() if key != name}
        spec = spec_of(name, words)
        job = self.jobs.get(name)
        if job is None:
            job = JobView(id=JobId(name), spec=spec, state=JobState.QUEUED, number=len(self.jobs) + 1)
        more: dict[str, Any] = {"spec": spec}
        for key, (field_name, convert) in _JOB.items():
            if key in said:
                more[field_name] = convert(said[key])
        self.jobs[name] = replace(job, **more)

    def on_attempt(self, flags: list[str], said: Words) -> None:
        job, number, state = self.now, Attempt(int(flags[0])), AttemptState(flags[1])
        before = job.attempt if job.attempt is not None and job.attempt.number == number else None
        layout = job.spec.parallelism.with_replicas(int(said.get("dp", job.spec.parallelism.dp)))
        if before is None:
            names = said["on"].split(",")
            parts = tuple(PartView(node=Node(name), heard=True) for name in names)
            before = AttemptView(number=number, state=state, layout=layout, parts=parts)
        went = state is not AttemptState.PREPARING and "waiting" not in said
        more: dict[str, Any] = {"state": state, "went": went}
        for key, (field_name, convert) in _ATTEMPT.items():
            if key in said:
                more[field_name] = convert(said[key])
        more["stepped"] = state is AttemptState.RUNNING or more.get("step", before.step) >= 0
        states = {AttemptState.RUNNING: JobState.RUNNING, AttemptState.ENDING: JobState.RECOVERING}
        attempt = replace(before, **more)
        lineage = job.lineage or (Link(attempt=number),)
        self.jobs[self.job] = replace(
            job,
            attempt=attempt,
            attempts=number,
            lineage=lineage,
            state=states.get(state, JobState.STARTING),
        )
        if not any(part.ranks for part in attempt.parts):
            phases = {AttemptState.PREPARING: PartPhase.PREPARING}
            for part in attempt.parts:
                self.on_part([part.node, phases.get(state, PartPhase.RUNNING)], {})

    def on_part(self, flags: list[str], said: Words) -> None:
        attempt = self.now.attempt
        assert attempt is not None
        self.part = attempt.nodes.index(Node(flags[0]))
        phase, part = PartPhase(flags[1]), attempt.parts[self.part]
        ranks = part.ranks
        if phase in (PartPhase.RUNNING, PartPhase.PREPARED):
            live = RankPhase.RUNNING if phase is PartPhase.RUNNING else RankPhase.WAITING
            local = local_ranks(attempt.layout.world_size, len(attempt.parts), self.part)
            ranks = tuple(RankView(rank=Rank(n), phase=live, step=attempt.step) for n in local)
        alive = int(said.get("alive", 0 if phase in (PartPhase.DEAD, PartPhase.REFUSED) else len(ranks)))
        master = said.get("master", "").split(":")
        part = replace(
            part,
            phase=phase,
            heard="unheard" not in said,
            reason=said.get("reason", ""),
            alive=alive,
            ranks=ranks,
            master=(master[0], int(master[1])) if len(master) == 2 else part.master,
        )
        self._set_part(part)

    def on_rank(self, flags: list[str], said: Words) -> None:
        assert self.now.attempt is not None
        number, phase = Rank(int(flags[0])), RankPhase(flags[1])
        attempt = self.now.attempt
        self.part = number * len(attempt.parts) // attempt.layout.world_size
        more: dict[str, Any] = {"phase": phase}
        for key, (field_name, convert) in _RANK.items():
            if key in said:
                more[field_name] = convert(said[key])
        part = attempt.parts[self.part]
        ranks = tuple(replace(rank, **more) if rank.rank == number else rank for rank in part.ranks)
        if "wait" in said:
            group, _, sequence = said["wait"].partition(":")
            peer = int(sequence) if group == "rank" else -1
            wait: dict[str, Any] = {"peer": peer, "group": "pp" if peer >= 0 else group, "waiting_s": 1.0}
            wait["group_sequence"] = 0 if peer >= 0 else int(sequence)
            ranks = tuple(replace(rank, **wait) if rank.rank == number else rank for rank in ranks)
        alive = sum(rank.phase is RankPhase.RUNNING for rank in ranks)
        self._set_part(replace(part, ranks=ranks, alive=alive))

    def on_losses(self, flags: list[str], _: Words) -> None:
        values: list[float] = []
        for word in flags[1:]:
            loss, _times, times = word.partition("*")
            values += [float(loss)] * int(times or 1)
        self.jobs[self.job] = replace(self.now, losses=tuple(enumerate(values, int(flags[0]))))

    def on_told(self, _: list[str], said: Words) -> None:
        self.jobs[self.job] = replace(self.now, found={key: float(age) for key, age in said.items()})

    def on_still(self, flags: list[str], _: Words) -> None:
        attempt = self.now.attempt
        assert attempt is not None
        still_s = float(flags[0])
        parts = tuple(
            replace(
                part, ranks=tuple(replace(r, still_s=still_s, counter=max(r.counter, 1)) for r in part.ranks)
            )
            for part in attempt.parts
        )
        attempt = replace(attempt, parts=parts, step_age_s=still_s, progress_age_s=still_s)
        self.jobs[self.job] = replace(self.now, attempt=attempt)

    def on_usual(self, flags: list[str], said: Words) -> None:
        seconds, count = float(flags[1]), int(said.get("count", 1000))
        bins = [0] * BINS
        bins[bin_of(round(seconds * 1e9))] = count
        longest_s = seconds
        if "odd" in said:
            longest_s = float(said["odd"])
            bins[bin_of(round(longest_s * 1e9))] += 1
        usual = Usual(count=count, origins=4, longest_s=longest_s, bins=tuple(bins))
        self.jobs[self.job] = replace(self.now, usual={**self.now.usual, flags[0]: usual})

    def on_look(self, flags: list[str], said: Words) -> None:
        job = self.now
        if flags[0] != "examining":
            look = Examined(attempt=Attempt(job.attempts), age_s=float(flags[0]))
            job = replace(job, examined=(*job.examined, look)[-2:])
        self.jobs[self.job] = replace(job, examining="examining" in said)

    def on_found(self, flags: list[str], said: Words) -> None:
        assert self.now.attempt is not None
        number, layout = Rank(int(flags[0])), self.now.attempt.layout
        groups = []
        for word in said.get("groups", "").split():
            name, figures, op = word.split(":")
            begun, done = figures.split("/")
            known = name in ("dp", "pp", "tp")
            ranks = layout.group(name, number) if known else tuple(map(Rank, range(layout.world_size)))
            groups.append(Recorded(name=name, ranks=ranks, enqueued=int(begun), completed=int(done), op=op))
        finding = Finding(
            rank=number,
            process=said.get("process", "running"),
            kernel=said.get("kernel", ""),
            interpreter=said.get("interpreter", "answers"),
            stack=tuple(filter(None, said.get("stack", "").split(", "))),
            groups=tuple(groups),
            links=tuple(_link(word) for word in said.get("links", "").split()),
        )
        *before, look = self.now.examined
        others = tuple(one for one in look.findings if one.rank != number)
        look = replace(look, findings=(*others, finding))
        self.jobs[self.job] = replace(self.now, examined=(*before, look))

    def on_ended(self, flags: list[str], said: Words) -> None:
        job = self.now
        ended = Ended(
            number=Attempt(int(flags[0])),
            nodes=_names(said["on"]),
            spares=_names(said.get("spares", "")),
            layout=job.spec.parallelism.with_replicas(int(said.get("dp", job.spec.parallelism.dp))),
            how=said.get("how", "confirmed"),
        )
        state = JobState(said.get("state", "recovering"))
        lineage = job.lineage or (Link(attempt=ended.number),)
        self.jobs[self.job] = replace(
            job, ended=ended, attempt=None, attempts=ended.number, state=state, lineage=lineage
        )

    def on_lineage(self, flags: list[str], _: Words) -> None:
        links = []
        for flag in flags:
            began, _mark, good = flag.partition("!")
            number, _less, parent = began.partition("<")
            at = _stored(parent) if parent else Stored(attempt=Attempt(0), step=Step(0))
            until = Step(int(good)) if good else None
            links.append(
                Link(attempt=Attempt(int(number)), parent=at.attempt, parent_step=at.step, good_until=until)
            )
        self.jobs[self.job] = replace(self.now, lineage=tuple(links))

    def on_failure(self, _: list[str], said: Words) -> None:
        failure = Failure(
            age_s=float(said.get("age", 1)),
            blame=said.get("blame", "job"),
            attempt=Attempt(int(said.get("attempt", self.now.attempts))),
            step=int(said.get("step", -1)),
            signature=said.get("signature", ""),
            node=Node(said["node"]) if "node" in said else None,
            exit_code=int(said.get("exit_code", 1)),
            error=said.get("error", ""),
            rank=Rank(int(said["rank"])) if "rank" in said else None,
        )
        self.jobs[self.job] = replace(self.now, failures=(*self.now.failures, failure))

    def on_stored(self, flags: list[str], said: Words) -> None:
        found = Inventory(
            after_attempt=Attempt(int(said.get("after", self.now.attempts))),
            node=Node(said.get("from", "a")),
            stored=tuple(_stored(flag) for flag in flags),
            error=said.get("error", ""),
        )
        self.jobs[self.job] = replace(self.now, inventory=found)

    def on_kept(self, flags: list[str], _: Words) -> None:
        node, own = Node(flags[0]), "own" in flags
        words = [flag for flag in flags[1:] if flag not in {"own", "stale"}]
        found = [one for one in self.now.kept if one.node != node or (words and one.own != own)]
        world = int(words[0]) if words else 0
        for word in words[1:]:
            ranks, _at, stamp = word.partition("@")
            first, _dash, last = ranks.partition("-")
            attempt, _dot, step = stamp.partition(".")
            found += [
                Kept(rank=Rank(rank), world=world, attempt=Attempt(int(attempt)), step=Step(int(step)),
                     node=node, own=own, fresh="stale" not in flags)
                for rank in range(int(first), int(last or first) + 1)
            ]  # fmt: skip
        self.jobs[self.job] = replace(self.now, kept=tuple(found))

    def on_saving(self, flags: list[str], said: Words) -> None:
        at, age_s = _stored(flags[0]), float(said.get("age", 0))
        saving = Saving(at=at, age_s=age_s, done="done" in said, error=said.get("error", ""))
        self.jobs[self.job] = replace(self.now, saving=saving)

    def on_newest(self, flags: list[str], _: Words) -> None:
        self.jobs[self.job] = replace(self.now, checkpoint_step=int(flags[0]))

    def on_asked(self, _: list[str], said: Words) -> None:
        asked = tuple(
            Asked(kind="inventory", node=Node(name), age_s=float(age)) for name, age in said.items()
        )
        self.jobs[self.job] = replace(self.now, asked=asked)

    def on_moment(self, flags: list[str], said: Words) -> None:
        numbers: Any = {
            key: int(value) for key, value in said.items() if key not in flags and key != "seconds"
        }
        kind: Any = flags[1]
        moment = Moment(at_s=float(flags[0]), kind=kind, seconds=float(said.get("seconds", 0)), **numbers)
        self.moments.append(moment)

    # ------------------------------------------------------------------ what is asked

    def on_decide(self, *_: object) -> list[str]:
        view = View(jobs=tuple(self.jobs.values()), nodes=tuple(self.nodes.values()), up_s=self.up_s)
        plan = decide(view, self.policy)
        assert plan == decide(view, self.policy), "the same view gives the same plan"
        lines = [line for change in plan.changes for line in told(change)]
        lines += [f"node {mark.node}: {mark.event}: {mark.reason}" for mark in plan.marks]
        return lines or ["nothing"]

    def on_memory(self, *_: object) -> list[str]:
        point = memory_point(self.now.lineage, self.now.kept, self.now.spec.parallelism)
        if point.at is None or point.memory is None:
            return [f"nothing   {point.reason}"]
        holders = " ".join(",".join(nodes) for nodes in point.memory.holders)
        at, dp = point.at, point.memory.layout.dp
        safe = protected_step(self.now.lineage, self.now.kept, self.now.spec.parallelism)
        protected = f"protected up to {safe}" if safe >= 0 else "not protected"
        return [f"{at.attempt}@{at.step} of dp {dp} from {holders}, {protected}   {point.reason}"]

    def on_restore(self, *_: object) -> list[str]:
        inventory = self.now.inventory
        point = restore_point(self.now.lineage, inventory.stored if inventory is not None else ())
        return [f"{_at(point.at)}   {point.reason}"]

    def on_observe(self, flags: list[str], _: Words) -> list[str]:
        silence = Silence()
        for word in flags[1:]:
            silence = silence.heard() if word == "heard" else silence.tick(float(word), float(flags[0]))
        return [f"silent for {silence.silence_s:g} s"]

    def on_ledger(self, flags: list[str], _: Words) -> list[str]:
        account = ledger(self.moments, float(flags[0]))
        lines = [f"{bucket:<17}{us / 1e6:8.2f}" for bucket, us in account.buckets.items() if us]
        lines.append(f"{'total':<17}{account.total_slot_s:8.2f}")
        for incident, cost in sorted(account.incidents.items()):
            each = ", ".join(f"{bucket} {us / 1e6:.2f}" for bucket, us in sorted(cost.items()))
            lines.append(f"incident {incident}: {each}")
        lines.append(f"goodput {account.goodput:.1%}, with spares {account.goodput_with_spares:.1%}")
        self.moments = []
        return lines

    # ------------------------------------------------------------------

    @property
    def now(self) -> JobView:
        return self.jobs[self.job]

    def _set_part(self, part: PartView) -> None:
        attempt = self.now.attempt
        assert attempt is not None
        parts = tuple(part if index == self.part else one for index, one in enumerate(attempt.parts))
        self.jobs[self.job] = replace(self.now, attempt=replace(attempt, parts=parts))


def _names(text: str) -> tuple[Node, ...]:
    return tuple(Node(name) for name in text.split(",") if name)


def _stored(text: str) -> Stored:
    attempt, step = text.split("@")
    return Stored(attempt=Attempt(int(attempt)), step=Step(int(step)))


def _link(text: str) -> Connected:
    ends, _, figures = text.partition(":")
    local, _, peer = ends.partition(">")
    rtt_s, least_s, *unanswered = map(float, figures.split("/"))
    return Connected(local=local, peer=peer, rtt_s=rtt_s, rtt_least_s=least_s, unanswered_s=sum(unanswered))


def _at(at: Stored | None) -> str:
    return "from nothing" if at is None else f"from {at.attempt}@{at.step}"


_NODE: dict[str, Callable[[str], tuple[str, Any]]] = {
    "slots": lambda text: ("slots", int(text)),
    "ready": lambda text: ("ready_s", float(text)),
    "state": lambda text: ("state", NodeState(text)),
    "confirmed": lambda text: ("confirmed", text),
    "attached": lambda text: ("attached", JobId(text)),
    "warm": lambda text: ("warm_for", frozenset(map(JobId, text.split(",")))),
    "label": lambda text: ("labels", dict([text.split(":", 1)])),
    "for": lambda text: ("labels", {RESERVED_FOR: text}),
    "lingering": lambda text: ("lingering", frozenset(map(JobId, filter(None, text.split(","))))),
    "away": lambda _: ("connected", False),
    "reset": lambda _: ("reset", True),
    "leaving": lambda _: ("leaving", True),
    "left": lambda _: ("left", True),
    "cordoned": lambda _: ("life", LifeState.CORDONED),
    "life": lambda word: ("life", LifeState(word)),
    "drain": lambda word: ("drain_s", float(word)),
    "because": lambda word: ("life_why", word),
    "by": lambda word: ("life_by", word),
}
_JOB: dict[str, tuple[str, Callable[[str], Any]]] = {
    "state": ("state", JobState),
    "wanted": ("wanted", Wanted),
    "wait": ("wait_s", float),
    "queued": ("queued_s", float),
    "reason": ("reason", str),
    "attached": ("attached", Node),
    "steps_done": ("steps_done", int),
    "attempts": ("attempts", lambda text: Attempt(int(text))),
    "started": ("measured", lambda text: Measured(starts={"first": float(text)})),
}
_ATTEMPT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "spares": ("spares", _names),
    "step": ("step", int),
    "step_age": ("step_age_s", float),
    "age": ("age_s", float),
    "still": ("still_s", float),
    "progress": ("progress_age_s", float),
    "every": ("step_every_s", float),
    "stored": ("checkpoint_step", int),
}
_PACE = ("step_s", "own_s", "data_s", "waited_s", "starved_s", "collected_s", "waited_least_s")
_RANK: dict[str, tuple[str, Callable[[str], Any]]] = {
    "exit": ("exit_code", int),
    "signal": ("signal", int),
    "age": ("exited_age_s", float),
    "order": ("exit_order", int),
    "step": ("step", int),
    "in": ("doing", str),
    "doing": ("doing_age_s", float),
    "process": ("process", str),
    "held": ("process_s", float),
    "still": ("still_s", float),
    "counter": ("counter", int),
    "pace": ("pace", lambda text: Pace(**dict(zip(_PACE, map(float, text.split("/")), strict=False)))),
    "gpu": ("gpu", lambda text: _gpu(*text.split(":"))),
    "trouble": ("trouble", str),
    "after": ("trouble_step", int),
    "error": ("error", str),
}


def _gpu(index: str, clock: str, link: str = "", throttled: str = "") -> Gpu:
    lanes, _, generation = link.partition("x")
    return Gpu(
        index=int(index),
        clock_mhz=int(clock),
        lanes=int(lanes) if lanes else None,
        generation=int(generation) if generation else None,
        throttled=tuple(filter(None, throttled.split("+"))),
    )


def told(change: p.JobChange) -> list[str]:
    """A change as people read it: what, why, and what else there was."""
    return [
        f"{change.job}: {_what(change)}",
        f"  {change.reason}",
        *(f"  not {option.option}: {option.why}" for option in change.rejected),
    ]


def _what(change: p.JobChange) -> str:  # noqa: C901, PLR0912 - one case a change
    match change:
        case p.Place():
            spares = f", spares {' '.join(change.spares)}" if change.spares else ""
            where = " in memory" if change.memory else ""
            start = f"PLACE attempt {change.attempt} ({change.rung}) on {' '.join(change.nodes)}{spares}"
            return f"{start}, dp {change.layout.dp}, {_at(change.restore)}{where}"
        case p.StandBy():
            return f"STAND BY for attempt {change.attempt}: {' '.join(change.spares) or 'none'}"
        case p.Go():
            return f"GO attempt {change.attempt}"
        case p.Stepped():
            return f"STEPPED attempt {change.attempt}, step {change.step}"
        case p.End():
            return _end(change)
        case p.Dead():
            return f"DEAD attempt {change.attempt} ({change.how})"
        case p.Complete():
            return f"COMPLETE attempt {change.attempt}"
        case p.Requeue():
            return f"REQUEUE, wait {change.wait_s:g} s"
        case p.GiveUp():
            return f"GIVE UP, exit code {change.exit_code}"
        case p.Rest():
            return f"REST {change.to}"
        case p.Wait():
            return f"wait, {change.due_s:g} s"
        case p.Collect():
            return f"COLLECT {change.kind} from {change.node} within {change.within_s:g} s"
        case p.Save():
            holders = " ".join(",".join(nodes) for nodes in change.memory.holders)
            return f"SAVE {change.at.attempt}@{change.at.step} from {holders} within {change.within_s:g} s"
        case p.Find():
            sure = f"{change.verdict.confidence:.0%} sure"
            return f"FIND {change.verdict.kind} in attempt {change.attempt}, {sure}"
        case p.Examine():
            return (
                f"EXAMINE attempt {change.attempt} on {' '.join(change.nodes)} within {change.within_s:g} s"
            )
        case _:
            raise AssertionError(change)


def _end(change: p.End) -> str:
    verdict = change.verdict
    if verdict is None:
        return f"END attempt {change.attempt}, grace {change.grace_s:g} s"
    who = "" if verdict.rank is None else f" rank {verdict.rank}"
    where = "" if verdict.node is None else f" on {verdict.node}"
    files = f", {change.finish_s:g} s to finish files" if change.finish_s else ""
    noticed = f"; {verdict.noticed}" if verdict.noticed else ""
    return f"END attempt {change.attempt}: {verdict.kind}{who}{where} ({verdict.blame}){files}{noticed}"
