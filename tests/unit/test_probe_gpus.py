"""From readings of GPUs to samples and checks."""

from typing import Any

import pytest

from keepstep.agent.probes.gpu import catalogue
from keepstep.agent.probes.gpu.evolution import Evolution, Hung, hung_checks, missing_check
from keepstep.agent.probes.gpu.inventory import Inventory, may_be_here
from keepstep.agent.probes.gpu.page import EVENTS, PASS, Page
from keepstep.agent.probes.gpu.reading import (
    Ecc,
    Fabric,
    Fast,
    Heat,
    Identity,
    Links,
    Pass,
    Pcie,
    Reading,
    Rows,
    decode,
    encode,
    pci_address,
)  # fmt: skip
from keepstep.core.health import CHECKS, Level
from keepstep.wire.health import Check

FIRST = Identity(index=0, uuid="GPU-a", pci="0000:0f:00.0", name="H100")
SECOND = Identity(index=1, uuid="GPU-b", pci="0000:10:00.0", name="H100")


def found(evolution: Evolution, now: float = 100.0) -> dict[str, Check]:
    checks = list(evolution.checks(now, (FIRST, SECOND), {}))
    assert all(check.name in CHECKS for check in checks)
    return {check.name: check for check in checks}


def after(*readings: Reading, now: float = 100.0) -> dict[str, Check]:
    evolution = Evolution()
    for reading in readings:
        evolution.take([reading])
    return found(evolution, now)


@pytest.mark.parametrize(
    ("tier", "check", "level"),
    [
        ({"heat": Heat(1.0, temperature=80, margin=1, slowdown_limit=-2)}, "gpu.temperature", Level.WARN),
        ({"heat": Heat(1.0, temperature=83, margin=-2, slowdown_limit=-2)}, "gpu.temperature", Level.BAD),
        ({"heat": Heat(1.0, temperature=60, margin=24, slowdown_limit=-2)}, "", ""),
        ({"heat": Heat(1.0, temperature=88, slowdown=90)}, "gpu.temperature", Level.WARN),
        ({"heat": Heat(1.0, memory_temperature=96)}, "gpu.memory_temperature", Level.WARN),
        ({"heat": Heat(1.0, memory_temperature=96, memory_max=105)}, "", ""),
        ({"heat": Heat(1.0, recovery_action=0)}, "", ""),
        ({"heat": Heat(1.0, recovery_action=2)}, "gpu.recovery_action", Level.BAD),
        ({"heat": Heat(1.0, recovery_action=99)}, "gpu.recovery_action", Level.BAD),
        ({"ecc": Ecc(1.0, correctable=9, uncorrectable=0)}, "", ""),
        ({"ecc": Ecc(1.0, uncorrectable=1)}, "gpu.ecc_uncorrectable", Level.BAD),
        ({"rows": Rows(1.0, correctable=3, uncorrectable=1, pending=0, failed=0)}, "", ""),
        ({"rows": Rows(1.0, pending=1)}, "gpu.row_remap_pending", Level.WARN),
        ({"rows": Rows(1.0, failed=1)}, "gpu.row_remap_failed", Level.BAD),
        ({"pcie": Pcie(1.0, width=8, width_max=16)}, "gpu.pcie_width", Level.WARN),
        ({"fabric": Fabric(1.0, state=3, summary=1)}, "", ""),
        ({"fabric": Fabric(1.0, state=2)}, "gpu.fabric", Level.WARN),
        ({"fabric": Fabric(1.0, state=3, status=999)}, "gpu.fabric", Level.BAD),
        ({"fabric": Fabric(1.0, state=3, summary=2)}, "gpu.fabric", Level.BAD),
        ({"error": catalogue.LOST}, "gpu.lost", Level.BAD),
        ({"error": 6}, "gpu.lost", Level.BAD),  # its address is not found any more
        ({"error": catalogue.RESET_REQUIRED}, "gpu.recovery_action", Level.BAD),
    ],
)
def test_one_reading_says_what_is_not_well(tier: dict[str, Any], check: str, level: str) -> None:
    checks = after(Reading(FIRST, **tier))
    assert {name: each.level for name, each in checks.items()} == ({check: level} if check else {})


def test_an_action_that_nobody_knows_means_drain() -> None:
    check = after(Reading(FIRST, heat=Heat(1.0, recovery_action=99)))["gpu.recovery_action"]
    assert check.value == 99 and "drain" in check.text


def test_what_was_told_last_is_the_action_that_is_asked_for() -> None:
    evolution = Evolution()
    evolution.take([Reading(FIRST, heat=Heat(10.0, recovery_action=0))])
    evolution.asked("GPU-a", 4, 12.0)  # by an event, between two looks at the field
    assert found(evolution)["gpu.recovery_action"].value == 4
    evolution.take([Reading(FIRST, heat=Heat(15.0, recovery_action=0))])
    assert found(evolution) == {}
    evolution.take([Reading(FIRST, heat=Heat(20.0))])  # a driver without the field: the event is all there is
    assert found(evolution)["gpu.recovery_action"].value == 4


def test_idle_links_are_slow_to_save_power() -> None:
    slow = Pcie(1.0, width=16, width_max=16, generation=1, generation_max=5)
    assert after(Reading(FIRST, pcie=slow, fast=Fast(1.0, utilisation=0))) == {}
    assert "gpu.pcie_width" in after(Reading(FIRST, pcie=slow, fast=Fast(1.0, utilisation=90)))


def test_a_link_is_down_by_what_it_was_and_by_its_peers() -> None:
    assert after(Reading(FIRST, links=Links(1.0, up=0, total=18))) == {}  # nothing is wired
    checks = after(Reading(FIRST, links=Links(1.0, up=18)), Reading(FIRST, links=Links(11.0, up=17)))
    assert checks["gpu.nvlink_down"].value == 1
    checks = after(Reading(FIRST, links=Links(1.0, up=12)), Reading(SECOND, links=Links(1.0, up=18)))
    assert checks["gpu.nvlink_down"].component == "GPU-a" and checks["gpu.nvlink_down"].value == 6


def test_counters_tell_by_how_they_grow() -> None:
    many = [Reading(FIRST, links=Links(10.0 * k, up=18, errors=1_000_000 + 20 * k)) for k in range(10)]
    checks = after(*many)
    assert checks["gpu.nvlink_errors"].value == 120  # within a minute, whatever it was before
    few = [Reading(FIRST, links=Links(10.0 * k, up=18, errors=1_000_000 + k)) for k in range(10)]
    assert after(*few) == {}
    again = [*many, Reading(FIRST, links=Links(100.0, up=18, errors=0))]
    assert after(*again) == {}, "the driver was loaded anew"
    errors = [Reading(FIRST, ecc=Ecc(60.0 * k, correctable=3 * k)) for k in range(61)]
    assert after(*errors)["gpu.ecc_correctable"].value == 180
    replays = [Reading(FIRST, pcie=Pcie(30.0 * k, replays=100 * k)) for k in range(4)]
    assert after(*replays)["gpu.pcie_replays"].value == 200


def test_why_clocks_are_held_down() -> None:
    def reasons(*readings: Fast) -> tuple[str, ...]:
        evolution = Evolution()
        for fast in readings:
            evolution.take([Reading(FIRST, fast=fast)])
        (sample,) = evolution.samples(readings[-1].at)
        return sample.throttled

    assert reasons(Fast(1.0, reasons=0x1)) == ()  # idle
    assert reasons(Fast(1.0, reasons=0x4)) == ("power",)
    assert reasons(Fast(1.0, reasons=0x48)) == ("thermal",)  # a slowdown by the hardware, for heat
    assert reasons(Fast(1.0, reasons=0x88)) == ("hardware",)  # the power brake
    assert reasons(Fast(1.0, policies={75: 5}), Fast(2.0, reasons=0, policies={75: 9})) == ("thermal",)
    assert reasons(Fast(1.0, policies={74: 5}), Fast(2.0, reasons=0, policies={74: 5})) == ()


def test_a_reason_stands_for_a_while_and_power_alone_is_no_trouble() -> None:
    evolution = Evolution()
    evolution.take([Reading(FIRST, fast=Fast(100.0, reasons=0x40))])
    evolution.take([Reading(FIRST, fast=Fast(101.0, reasons=0))])
    assert "thermal" in found(evolution, now=105.0)["gpu.throttled"].text
    assert found(evolution, now=120.0) == {}
    assert after(Reading(FIRST, fast=Fast(100.0, reasons=0x4))) == {}


def test_calls_that_should_work_and_do_not_are_told_when_they_fail_again_and_again() -> None:
    evolution = Evolution()
    for k in range(3):
        assert evolution.failing() == ""
        evolution.take([Reading(FIRST, failing={"nvmlDeviceGetMemoryInfo": 999}, fast=Fast(float(k)))])
    assert "nvmlDeviceGetMemoryInfo of GPU 0 (error 999)" in evolution.failing()
    evolution.take([Reading(FIRST, fast=Fast(4.0))])
    assert evolution.failing() == ""


def test_lost_before_it_was_ever_read_hung_and_missing() -> None:
    (lost,) = Evolution().checks(1.0, (FIRST, SECOND), {1: catalogue.LOST})
    assert (lost.name, lost.component) == ("gpu.lost", "GPU-b")
    (hung,) = hung_checks({"GPU-b": Hung(call="nvmlDeviceGetName", since=40.0)}, 50.0)
    assert hung.value == 10.0 and "nvmlDeviceGetName" in hung.text
    assert list(missing_check(2, 2, ())) == []
    (missing,) = missing_check(2, 1, (SECOND,))
    assert (missing.value, missing.limit) == (1, 2) and "GPU-b" in missing.text


def test_samples_age_while_nothing_new_comes() -> None:
    evolution = Evolution()
    evolution.take([Reading(FIRST, fast=Fast(10.0, utilisation=97, energy_mj=5000), heat=Heat(8.0))])
    (sample,) = evolution.samples(13.5)
    assert (sample.age_s, sample.utilisation, sample.energy_j, sample.temperature_c) == (3.5, 97, 5.0, None)


def test_domains_of_nvlink_are_facts() -> None:
    evolution = Evolution()
    evolution.take([Reading(FIRST, fabric=Fabric(1.0, state=3, cluster="0a" * 16, clique=7))])
    evolution.take([Reading(SECOND, fabric=Fabric(1.0, state=3, cluster="00" * 16, clique=0))])  # none
    assert evolution.fabric() == {"GPU-a": "0a" * 16 + "/7"}


@pytest.mark.parametrize(
    "text", ["0000:0f:00", "PCI:0000:0f:00", "00000000:0F:00.0", "0f:00.0", "0000:0f:00.0"]
)
def test_one_address_has_one_spelling(text: str) -> None:
    assert pci_address(text) == "0000:0f:00.0"


def test_what_is_no_address_is_left_as_it_is() -> None:
    assert pci_address(":::") == ":::"


def test_the_page_says_which_call_lasts() -> None:
    page = Page.made()
    try:
        assert page.look(PASS)[2] == ""
        page.enter(PASS, 5, "nvmlDeviceGetMemoryInfo", 12.0)
        page.enter(EVENTS, 0, "nvmlEventSetWait", 13.0)
        count, gpu, call, since = page.look(PASS)
        assert (gpu, call, since) == (5, "nvmlDeviceGetMemoryInfo", 12.0)
        page.leave(PASS)
        assert page.look(PASS)[0] == count + 1 and page.look(PASS)[2] == ""
        assert page.look(EVENTS)[2] == "nvmlEventSetWait"
    finally:
        page.close()


def test_frames_come_back_as_they_were() -> None:
    frame = Pass([Reading(FIRST, fast=Fast(1.0, policies={74: 2**40}), failing={"x": 999})], cpu_ms=1.5)
    assert decode(encode(frame)[4:]) == frame


def test_the_most_gpus_that_there_were_are_remembered(tmp_path: Any) -> None:
    Inventory(tmp_path / "gpus.json").see([FIRST, SECOND])
    store = Inventory(tmp_path / "gpus.json")
    store.see([FIRST])
    assert Inventory(tmp_path / "gpus.json").gpus == (FIRST, SECOND)
    other = Identity(index=1, uuid="GPU-c", pci="0000:10:00.0", name="H100")
    store.see([FIRST, other])  # one was replaced
    assert Inventory(tmp_path / "gpus.json").gpus == (FIRST, other)
    (tmp_path / "gpus.json").write_text("no JSON")
    assert Inventory(tmp_path / "gpus.json").gpus == ()


def test_a_library_in_the_loaders_path_is_worth_a_try(tmp_path: Any) -> None:
    assert not may_be_here({"LD_LIBRARY_PATH": str(tmp_path)}) or may_be_here({})
    (tmp_path / "libnvidia-ml.so.1").touch()
    assert may_be_here({"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}"})
