"""What people ask of the controller: submit, steer, confirm a loss. The wish is written; the cycle acts."""

from dataclasses import dataclass
from typing import Any

from keepstep.control.commit import REQUEUE
from keepstep.control.loop import Controller
from keepstep.control.submission import enter
from keepstep.core.errors import InputError, NotFound, Refused
from keepstep.core.ids import Node
from keepstep.core.job import JobSpec
from keepstep.core.states import JOB
from keepstep.decide.view import Wanted
from keepstep.spec import from_dict
from keepstep.store import Writer
from keepstep.store.rows import Job, NewEvent

_FINAL = {str(state) for state in JOB.final}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks, from the token."""

    name: str
    project: str


async def submit(
    controller: Controller, spec: JobSpec, who: Principal, *, source: Any = None, attached: Node | None = None
) -> Job:
    """Accept a job: from here on it is never forgotten. Errors: InputError."""
    if attached is not None and attached not in controller.fleet.members:
        raise InputError(f"node {attached} is not connected, so no job can be attached to it")
    if attached is None and spec.pool not in controller.pools:
        known = ", ".join(sorted(controller.pools))
        raise InputError(
            f"there is no pool {spec.pool!r}", where="pool", next=f"This controller has: {known}."
        )

    def write(writer: Writer) -> Job:
        return enter(writer, spec, who=who.name, project=who.project, source=source, attached=attached)

    job = await controller.write(write)
    await controller.refresh(job.id)
    controller.wake()
    return job


async def want(controller: Controller, ref: str, wish: Wanted, who: Principal, reason: str = "") -> Job:
    """Cancel, suspend or resume. Errors: NotFound; Refused where the job is finished."""
    job = await controller.on_store(controller.store.job, ref)
    if job.state in _FINAL:
        raise Refused(
            f"job {job.id} has already {job.state}", next="`keepstep submit` runs it again as a new job."
        )
    if job.wanted == "cancel" and wish is not Wanted.CANCEL:
        raise Refused(f"job {job.id} is being cancelled")

    def write(writer: Writer) -> Job:
        verb = {Wanted.RUN: "resume", Wanted.SUSPEND: "suspend", Wanted.CANCEL: "cancel"}[wish]
        because = f": {reason}" if reason else ""
        writer.add_event(
            NewEvent(kind=f"asked to {verb}", text=f"{who.name} asked to {verb}{because}", job=job.id)
        )
        return writer.update_job(job.id, wanted=wish.value, wanted_by=who.name, wanted_reason=reason)

    return await controller.write(write, about=job.id)


async def confirm_lost(controller: Controller, name: str, who: Principal, reason: str) -> None:
    """A person's word that a node is dead. Errors: NotFound, Refused where it talks."""
    member = controller.fleet.members.get(Node(name))
    if member is None:
        known = ", ".join(sorted(controller.fleet.members)) or "none"
        raise NotFound(f"there is no node {name!r}", next=f"Known nodes: {known}.")
    if member.talks(controller.time):
        raise Refused(
            f"node {name} is connected",
            why="a node that talks is not lost",
            next=f"Stop its agent first, or `keepstep node cordon {name}`.",
        )
    member.confirmed_at = controller.time.now
    member.confirmed = f"{who.name} confirmed that it is lost" + (f": {reason}" if reason else "")

    def write(writer: Writer) -> None:
        text = f"confirm-lost by {who.name}" + (f": {reason}" if reason else "")
        writer.add_event(NewEvent(kind="node confirm-lost", text=text, node=member.name, principal=who.name))

    await controller.write(write)
    controller.wake()


def parse_spec(data: Any) -> JobSpec:
    """A spec as it came over HTTP. Errors: InputError."""
    if not isinstance(data, dict):
        raise InputError("the body needs a `spec`, as `keepstep spec check -o json` prints it")
    spec = from_dict(data)
    if spec.validates:
        raise InputError(
            "only keepstep's own jobs validate nodes", where="validates", next="keepstep node validate"
        )
    return spec


async def steer(controller: Controller, ref: str, verb: str, who: Principal, reason: str) -> Job:
    """cancel, suspend, resume or requeue. Errors: NotFound, Refused."""
    wishes = {"cancel": Wanted.CANCEL, "suspend": Wanted.SUSPEND, "resume": Wanted.RUN}
    if verb in wishes:
        return await want(controller, ref, wishes[verb], who, reason)
    if verb != "requeue":
        raise NotFound(f"a job cannot be asked to {verb!r}", next="It can: cancel, suspend, resume, requeue.")
    return await want(controller, ref, Wanted.SUSPEND, who, REQUEUE)
