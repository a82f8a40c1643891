"""What is seen of unchanged scripts: steps, batches, phases; and that nothing of it is in their way."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hooked import HOOKED, TOY, Shown, loaded, seen
from keepstep.agent.standby import StandbyServer
from keepstep.core.beacon import Phase
from shims import ENV

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # torch is loaded, beside whatever else is done


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandbyServer]:
    with loaded(tmp_path_factory.mktemp("standby")) as server:
        yield server


def run(
    folder: Path, server: StandbyServer | None, text: str, *, ranks: int = 1, name: str = "1"
) -> list[Shown]:
    found = asyncio.run(seen(folder, TOY + text, ranks=ranks, server=server, name=name))
    assert all(rank.exit_code == 0 for rank in found[0].ending.ranks), found[0].said
    assert "keepstep:" not in "".join(one.said for one in found)
    return found


PLAIN = """
dist.init_process_group("gloo")
model = DDP(nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(2):
    for (batch,) in loader():
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
with torch.no_grad():
    for (batch,) in loader(4):
        model(batch)
dist.barrier()
dist.destroy_process_group()
print("over")
"""


def test_plain_ddp(tmp_path: Path, server: StandbyServer) -> None:
    for one in run(tmp_path, server, PLAIN, ranks=2):
        assert (one.record.step, one.record.batches, one.said) == (12, 16, "over\n")
        assert one.record.phase is Phase.UNKNOWN
        # The first batch of an epoch, and all of an evaluation, may take their time; ends are asked for, too.
        assert one.count == {"data": 12, "forward": 12, "backward": 12, "optimizer": 12}


COLLECTS = """
import gc, os
gc.collect()
gc.disable()
for _ in range(5):
    crowd = [[k] for k in range(100_000)]
    gc.collect()
pid = os.fork()
if not pid:
    gc.collect()  # a child's are none of the rank's
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_garbage_collection_is_counted_beside_the_phases(tmp_path: Path, server: StandbyServer) -> None:
    (one,) = run(tmp_path, server, COLLECTS)
    whole = one.phases[Phase.COLLECTING]
    assert whole.count >= 5 and 0 < whole.longest_ns <= whole.total_ns
    (less,) = run(tmp_path, server, COLLECTS.replace("range(5)", "range(0)"), name="2")
    assert whole.count - less.phases[Phase.COLLECTING].count == 5


_STEPS = {
    "accumulated": (
        6, {"data": 18, "backward": 18, "optimizer": 6}, """
for k, (batch,) in enumerate(loader(18)):
    model(batch).sum().backward()
    if k % 3 == 2:
        optimizer.step()
        optimizer.zero_grad()
"""),
    "two_optimizers": (
        5, {"backward": 10, "optimizer": 10}, """
critic = nn.Linear(2, 1)
other = torch.optim.Adam(critic.parameters())
for _ in range(5):
    for which in (optimizer, other):
        critic(model(torch.ones(2, 3))).sum().backward()
        which.step()
"""),
    "five_critics_a_step": (
        4, {"backward": 24, "optimizer": 24}, """
critic = nn.Linear(2, 1)
other = torch.optim.Adam(critic.parameters())
for _ in range(4):
    for which in (optimizer, *[other] * 5):
        critic(model(torch.ones(2, 3))).sum().backward()
        which.step()
"""),
    "one_for_each_parameter_in_backward": (
        7, {"backward": 7}, """
for parameter in model.parameters():
    def update(p, own=torch.optim.SGD([parameter], lr=0.1)):
        own.step()
        own.zero_grad()
    parameter.register_post_accumulate_grad_hook(update)
for _ in range(7):
    model(torch.ones(2, 3)).sum().backward()
"""),
    "a_subclass_that_calls_super": (
        5, {"backward": 5, "optimizer": 5}, """
class Mine(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)
optimizer = Mine(model.parameters(), lr=0.1)
for _ in range(5):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
"""),
    "one_around_another": (
        5, {"backward": 5, "optimizer": 5}, """
class Around(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner
    def step(self, closure=None):
        self.inner.step()
        self.inner.step()
outer = Around(optimizer)
for _ in range(5):
    model(torch.ones(2, 3)).sum().backward()
    outer.step()
"""),
    "skipped_by_a_scaler": (
        8, {"backward": 12, "optimizer": 8}, """
scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
for k in range(12):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3)).sum() * (float("inf") if k % 3 == 1 else 1.0)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""),
    "a_step_that_fails": (
        9, {"backward": 10, "optimizer": 9}, """
class Mine(torch.optim.SGD):
    failing = False
    def step(self, closure=None):
        if self.failing:
            raise RuntimeError("out of memory")
        return super().step(closure)
optimizer = Mine(model.parameters(), lr=0.1)
for k in range(10):
    Mine.failing = k == 4
    model(torch.ones(2, 3)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError:
        assert k == 4
"""),
    "with_a_closure": (
        3, {"backward": 12}, """
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, tolerance_grad=0, tolerance_change=0)
target = torch.tensor([[1.0, 2.0]])
def closure():
    optimizer.zero_grad()
    loss = (model(torch.ones(1, 3)) - target).pow(2).sum() + model.weight.pow(4).sum()
    loss.backward()
    return loss
for _ in range(3):
    optimizer.step(closure)
"""),
    "another_optimizer_from_the_middle_on": (
        None, {"backward": 60, "optimizer": 60}, """
later = torch.optim.Adam(model.parameters())
for k in range(60):
    model(torch.ones(2, 3)).sum().backward()
    (optimizer if k < 10 else later).step()
"""),
    "gone_on_from_a_checkpoint": (
        43, {"backward": 3, "optimizer": 3}, """
optimizer = torch.optim.AdamW(model.parameters())
saved = optimizer.state_dict()
for k, parameter in enumerate(model.parameters()):
    zero = torch.zeros_like(parameter)
    saved["state"][k] = {"step": torch.tensor(40.0), "exp_avg": zero, "exp_avg_sq": zero.clone()}
optimizer.load_state_dict(saved)
for _ in range(3):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
"""),
    "in_threads_and_children": (
        4, {"backward": 4, "optimizer": 4}, """
import os, threading
def others():
    for (batch,) in loader():
        torch.ones(1, requires_grad=True).sum().backward()
for _ in range(4):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    thread = threading.Thread(target=others)
    thread.start()
    thread.join()
    child = os.fork()
    if child == 0:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        raise SystemExit
    assert os.waitpid(child, 0)[1] == 0
"""),
    "compiled": (
        4, {"backward": 4, "optimizer": 4}, """
@torch.compile(backend="eager", fullgraph=True)
def forward(x):
    return model(x).sum()
for _ in range(4):
    forward(torch.ones(2, 3)).backward()
    optimizer.step()
later = torch.optim.SGD(model.parameters(), lr=0.1)
@torch.compile(backend="eager")
def step():
    later.step()
step()
step()
"""),
    "workers": (
        8, {"data": 8, "backward": 8, "optimizer": 8}, """
for (batch,) in loader(8, num_workers=2):
    model(batch).sum().backward()
    optimizer.step()
"""),
    "one_that_marks_by_itself": (
        70, {"checkpoint": 1}, """
from keepstep.session import Phase, current
current().phase(Phase.CHECKPOINT)
for k in range(7):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    current().step_done(10 * k + 10)
current().phase(Phase.FINISHED)
"""),
}  # fmt: skip


@pytest.mark.parametrize("case", _STEPS)
def test_steps(tmp_path: Path, server: StandbyServer, case: str) -> None:
    step, counts, text = _STEPS[case]
    model = "model = nn.Linear(3, 2)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    one = run(tmp_path, server, model + text)[0]
    count = {phase: number for phase, number in one.count.items() if phase != "starting"}
    assert count == counts
    # One that was replaced in the middle is still waited for through a few steps of its successor.
    assert one.record.step == step or (step is None and 50 <= one.record.step <= 60)


def test_an_evaluation_has_no_phase_that_it_could_be_late_in(tmp_path: Path, server: StandbyServer) -> None:
    """Among training steps, on a loader of its own and without one, with gradients on where scripts fetch."""
    text = """
import sys
marks = sys.modules["keepstep_hook"]._present["marks"]
dist.init_process_group("gloo")
class Model(nn.Linear):
    def forward(self, x):
        if evaluating: seen.add(marks._phase)
        return super().forward(x)
evaluating, seen = False, set()
model = DDP(Model(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def evaluate():
    global evaluating
    evaluating = True
    seen.add(marks._phase)
    for (batch,) in loader():
        seen.add(marks._phase)
        with torch.no_grad():
            model(batch)
    model.eval()
    model(torch.ones(1, 3))
    model.train()
    evaluating = False
for epoch in range(2):
    for (batch,) in loader():
        model(batch).sum().backward()
        optimizer.step()
        evaluate()
    evaluate()
print(seen)
dist.destroy_process_group()
"""
    one = run(tmp_path, server, text)[0]
    assert (one.said, one.record.step) == ("{255}\n", 12)
    assert one.count == {"data": 12, "forward": 12, "backward": 12, "optimizer": 12}


def test_groups_come_and_go_as_often_as_a_script_likes(tmp_path: Path, server: StandbyServer) -> None:
    text = """
for number in range(4):
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    print(number, x.item(), flush=True)
    dist.destroy_process_group()
"""
    for one in run(tmp_path, server, text, ranks=2):
        assert one.said == "0 2.0\n1 2.0\n2 2.0\n3 2.0\n"
    assert list((tmp_path / "1").glob("control-*.sock")) == []  # removed at the end


def test_what_breaks_in_it_disturbs_nobody(tmp_path: Path, server: StandbyServer) -> None:
    """A PyTorch that is not as it was known, and marks that fail."""
    text = """
import sys
marks = sys.modules["keepstep_hook"]._present["marks"]
marks._passed = marks._put = None
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for (batch,) in loader():
    model(batch).sum().backward()
    optimizer.step()
print("over")
"""
    found = asyncio.run(seen(tmp_path, TOY + text, server=server))[0]
    assert found.ending.ranks[0].exit_code == 0
    *told, last = found.said.splitlines()
    assert last == "over" and len(told) == 1 and "keepstep: progress is not reported" in told[0]


_VISIBLE = """
import os, sys
torch.manual_seed(1)
dist.init_process_group("gloo")
model = DDP(nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for (batch,) in loader():
    model(batch).sum().backward()
    optimizer.step()
print(model.module.weight.tolist(), sys.path, os.environ.get("PYTHONPATH"), sys.argv)
print(DDP.forward.__qualname__, torch.autograd.backward.__module__, len(os.sched_getaffinity(0)))
dist.destroy_process_group()
sys.exit(7)
"""


def test_a_script_cannot_tell(tmp_path: Path) -> None:
    """From a cold start, with a path of its own, with the hook, without it, and with one that is broken."""
    mine = {"PYTHONPATH": str(tmp_path / "mine")}
    plain = ENV | mine
    path = f"{mine['PYTHONPATH']}:{HOOKED['PYTHONPATH']}"
    envs = {
        "without": plain,
        "with": HOOKED | {"PYTHONPATH": path},
        "broken": HOOKED | {"PYTHONPATH": path, "KEEPSTEP_BEACON_CODE": "/no/such/file"},
    }
    shown = {
        name: asyncio.run(seen(tmp_path, TOY + _VISIBLE, env=env, name=name)) for name, env in envs.items()
    }
    for name, ranks in shown.items():
        assert [rank.exit_code for rank in ranks[0].ending.ranks] == [7], ranks[0].said
        for one, without in zip(ranks, shown["without"], strict=True):
            words = [line for line in one.said.splitlines() if not line.startswith("keepstep: ")]
            assert words == without.said.splitlines()
            assert one.record.step == (6 if name == "with" else -1)
    assert shown["broken"][0].said.count("keepstep: ") == 1
