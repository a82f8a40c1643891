"""The options that name a Ray cluster: what is typed is what the controller gets, and mistakes are told."""

import importlib.util

import pytest

from keepstep.cli.rayed import NO_RAY, RayOptions
from keepstep.core.errors import InputError


def test_no_address_is_no_ray() -> None:
    NO_RAY.check()
    assert NO_RAY.arguments() == []


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_it_is_said_that_ray_is_not_installed() -> None:
    with pytest.raises(InputError, match=r"--ray: Ray is not installed here"):
        RayOptions(address="auto").check()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_what_is_typed_is_what_the_pool_gets() -> None:
    asked = RayOptions(address="10.0.0.1:6379", resource="slot", labels=("rack=in(a,b)",), folder="/d")
    first = asked.settings("me")
    assert first.terms.prefix == "keepstep/me/"
    assert RayOptions(address="h:1").settings("me").folder == "/tmp/keepstep-ray/me"
    assert first.terms.labels == {"rack": "in(a,b)"}
    assert (first.address, first.terms.resource, first.folder) == ("10.0.0.1:6379", "slot", "/d")
    with pytest.raises(InputError, match="'rack' is not KEY=VALUE"):
        RayOptions(address="auto", labels=("rack",)).check()


def test_auto_is_what_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert RayOptions(address="auto").found == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert RayOptions(address="auto").found == "ray://head:10001"
    assert RayOptions(address="other:6379").found == "other:6379"
