"""The options that name a Ray cluster: what is typed is what the controller gets, and mistakes are told."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from typer import Context
from typer.main import get_command

from keepstep.cli.processes import app
from keepstep.cli.rayed import NO_RAY, RayOptions
from keepstep.core.errors import InputError

DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"


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


def test_the_kuberay_example_is_one_cluster_whose_controller_takes_its_options() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "raycluster.yaml").read_text()))
    (cluster,) = (found for found in documents if found["kind"] == "RayCluster")
    (deployment,) = (found for found in documents if found["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    keepstep, verb, *given = container["command"]
    assert keepstep == "keepstep"
    group = get_command(app)
    command = group.get_command(Context(group), verb)  # type: ignore[attr-defined]
    taken = command.make_context(verb, given).params
    head = urlsplit(taken["ray"])
    assert head.hostname == f"{cluster['metadata']['name']}-head-svc"  # as KubeRay calls it
    ports = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert head.port in {port["containerPort"] for port in ports}
    assert taken["ray_label"] == ["accelerator=h100"]
    assert cluster["spec"]["workerGroupSpecs"][0]["labels"] == {"accelerator": "h100"}
    image = re.search(r"rayproject/ray:([\d.]+)-", (DEPLOY / "Dockerfile").read_text())
    assert image is not None and image[1] == cluster["spec"]["rayVersion"]
