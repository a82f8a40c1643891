"""The operator's own policy on node health: laid over keepstep's, and refused with its lines."""

from pathlib import Path

import pytest

from keepstep.core.errors import InputError
from keepstep.core.rules import Action, Hook
from keepstep.spec.rules import load_rules


def read(folder: Path, text: str) -> object:
    file = folder / "policy.yaml"
    file.write_text(text)
    return load_rules(file)


def test_it_is_laid_over_keepsteps_own(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "rules:\n  - {name: GPU off the bus, xid: [79], class: gpu, actions: [replace]}\n"
        "  - {name: ours, xid: [45], class: node, actions: [watch]}\n"
        "deadlines: {drain: 3m}\n"
        'hooks: {reboot: {kubernetes: "{node}", within: 30m}, ticket: {ray: "ray-{node}", tries: 1}}\n'
    )
    policy, shipped = load_rules(file), load_rules()
    assert [policy.rule("xid", code).name for code in (79, 45, 48)] == [  # type: ignore[union-attr]
        "GPU off the bus", "ours", "GPU needs a reset",
    ]  # fmt: skip
    lost = policy.rule("gpu.lost")
    assert lost is None, "the rule that took it is replaced by one that does not"
    assert policy.rule("xid", 79).actions == (Action.REPLACE,)  # type: ignore[union-attr]
    assert policy.deadlines.drain_s == 180.0
    assert policy.deadlines.idle_s == shipped.deadlines.idle_s
    assert policy.hooks["reboot"] == Hook(kubernetes="{node}", within_s=1800.0)
    assert (policy.hooks["ticket"].way, policy.hooks["ticket"].ray) == ("ray", "ray-{node}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules:\n  - {name: x, xid: [79], class: gpo, actions: [watch]}", "policy.yaml:2:"),
        ("rules:\n  - {name: x, xid: [79], class: gpu, actions: [rebot]}", "rebot is not known here"),
        ("rules:\n  - {name: x, on: [gpu.lots], class: gpu, actions: [watch]}", "no check or event"),
        ("deadlines:\n  drain: soon", "policy.yaml:2:"),
        ("bounds: {share: 1.5}", "must be more than 0 and at most 1"),
        ("hooks: {reboot: {within: 5m}}", "needs one of `command`, `webhook`, `kubernetes`, `ray`"),
        ('hooks: {reboot: {kubernetes: "{nod}"}}', "{nod} is not known here"),
        ('hooks: {reboot: {ray: "{node}", webhook: "https://x"}}', "needs one of"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, text)
    assert said in str(refused.value) and "policy.yaml:" in str(refused.value)
