"""Options of commands that have to do with a Ray cluster; Ray itself is not imported here."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from keepstep.core.errors import InputError

if TYPE_CHECKING:
    from keepstep.pools.ray.pool import RaySettings

_CHECKUP_WITHIN_S = 120.0

RayAddress = Annotated[
    str,
    typer.Option(
        "--ray",
        help="A Ray cluster as the pool `ray`: host:port or auto (RAY_ADDRESS) on one of its nodes, "
        "ray://host:10001 from anywhere.",
    ),
]
RayResource = Annotated[
    str, typer.Option("--ray-resource", help="Ray's resource that is a slot: GPU, CPU or a custom one.")
]
RayLabels = Annotated[
    list[str] | None,
    typer.Option("--ray-label", help="Use only nodes with this label: KEY=VALUE, as Ray selects by them."),
]
RayDir = Annotated[
    str, typer.Option("--ray-dir", help="Where agents keep their state on the nodes; else in /tmp.")
]
RayUrl = Annotated[
    str, typer.Option("--ray-url", help="Where the nodes reach the controller, if not at its --host.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    address: str = ""  # "": no Ray
    resource: str = "GPU"
    labels: tuple[str, ...] = ()
    folder: str = ""
    url: str = ""

    def arguments(self) -> list[str]:
        if not self.address:
            return []
        given = ["--ray", self.address, "--ray-resource", self.resource]
        for label in self.labels:
            given += ["--ray-label", label]
        given += ["--ray-dir", self.folder] if self.folder else []
        return given + (["--ray-url", self.url] if self.url else [])

    def check(self) -> None:
        """Errors: InputError."""
        if not self.address:
            return
        if importlib.util.find_spec("ray") is None:
            raise InputError(
                "Ray is not installed here",
                where="--ray",
                next="pip install 'keepstep[ray]' here, in the version that its nodes have.",
            )
        for label in self.labels:
            if not all(label.partition("=")[::2]):
                raise InputError(f"{label!r} is not KEY=VALUE", where="--ray-label")

    def checkup(self) -> list[dict[str, str]]:
        """What is found wrong with the cluster, by a process of its own. Errors: InputError."""
        self.check()
        command = [sys.executable, "-m", "keepstep.pools.ray.checkup", self.found, self.resource, self.url]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_CHECKUP_WITHIN_S, check=False)
            found: list[dict[str, str]] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            told = f"{self.found}: no answer within {_CHECKUP_WITHIN_S:g} s"
            return [{"what": "ray cluster", "state": "failed", "told": told}]
        except ValueError:
            told = f"{self.found}: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}"
            return [{"what": "ray cluster", "state": "failed", "told": told}]
        return found

    @property
    def found(self) -> str:
        """The address, with what the environment says."""
        return os.environ.get("RAY_ADDRESS") or "auto" if self.address == "auto" else self.address

    def settings(self, owner: str) -> "RaySettings":
        """`owner`: by what a controller knows its own in the cluster."""
        from keepstep.pools.ray.groups import Terms
        from keepstep.pools.ray.pool import RaySettings

        self.check()
        labels = {key: value for key, _, value in (label.partition("=") for label in self.labels)}
        terms = Terms(owner=owner, resource=self.resource, labels=labels)
        folder = self.folder or f"/tmp/keepstep-ray/{owner}"  # noqa: S108 - agents close theirs to others
        return RaySettings(address=self.found, terms=terms, url=self.url, folder=folder)


NO_RAY = RayOptions()
