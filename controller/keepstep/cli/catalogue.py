"""Every command by name: where it lives and what it is for, so that help needs none of their modules.

A command's module is imported when the command is invoked or its own help is asked for; the help of the whole
is made from this table alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from keepstep.core.errors import KeepstepError


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    module: str  # within keepstep.cli; its `app` holds the command, or is the group
    summary: str
    group: bool = False


SECTIONS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    (
        "Jobs",
        (
            Entry("run", "run", "Run a script in torchrun's place, on this machine, attached."),
            Entry("submit", "submit", "Submit a job from its YAML file."),
            Entry("list", "jobs", "List jobs, newest first."),
            Entry("status", "jobs", "Where a job is: state, step, loss, speed."),
            Entry("describe", "describe", "Everything about a job: ranks, attempts, incidents, decisions."),
            Entry("logs", "logs", "What ranks printed."),
            Entry("events", "events", "What happened, in order."),
            Entry("wait", "waiting", "Wait until a job runs, has recovered, has ended ..."),
            Entry("top", "top", "Jobs and nodes at a glance, live."),
        ),
    ),
    (
        "Understand",
        (
            Entry("explain", "explain", "One incident: what happened, what was decided and why."),
            Entry("stacks", "stacks", "Where every rank stands at this moment, the odd ones first."),
            Entry("goodput", "goodput", "Where a job's slot-seconds went."),
        ),
    ),
    (
        "Steer",
        (
            Entry("cancel", "steer", "End a job for good."),
            Entry("suspend", "steer", "Stop a job and free its nodes; resume goes on later."),
            Entry("resume", "steer", "Let a suspended job go on."),
            Entry("requeue", "steer", "End a job's present attempt and queue it again."),
            Entry(
                "node",
                "nodes",
                "Nodes: list, describe, history, cordon, drain, uncordon, validate, screen, policy.",
                group=True,
            ),
        ),
    ),
    (
        "Plan",
        (Entry("spec", "specs", "The job file: schema, check, explain a field.", group=True),),
    ),
    (
        "Model",
        (
            Entry(
                "data", "trainer", "Text for training: tokenise it once into shards, verify and show them."
            ),
            Entry("generate", "trainer", "Let a trained model continue texts, from a checkpoint or weights."),
            Entry("weights", "trainer", "Export a checkpoint's weights; verify weights of any format."),
        ),
    ),
    (
        "Service",
        (
            Entry("up", "up", "Start a controller with local nodes on this machine."),
            Entry("down", "up", "Stop it."),
            Entry("demo", "demo", "Eight ranks, three faults, one loss curve: two minutes on this machine."),
            Entry("doctor", "doctor", "Check this machine and the controller."),
            Entry("context", "contexts", "Controllers by name: list, use, add.", group=True),
            Entry("token", "tokens", "Access: create, list, revoke.", group=True),
            Entry("bundle", "bundles", "Pack a working folder as submit would."),
            Entry("controller", "processes", "Run the controller in the foreground."),
            Entry("agent", "processes", "Run a node's agent in the foreground."),
        ),
    ),
)

OPTIONS: tuple[tuple[str, str], ...] = (
    ("--context NAME", "The controller to talk to (keepstep context list). [env: KEEPSTEP_CONTEXT]"),
    ("--version", "Print the version."),
    ("--install-completion", "Install completion for the current shell."),
    ("--show-completion", "Print the completion script."),
    ("--help", "This text; keepstep COMMAND --help for a command's own."),
)

# What people type elsewhere for the same thing.
SYNONYMS = {
    "ps": "list",
    "ls": "list",
    "jobs": "list",
    "get": "list",
    "kill": "cancel",
    "stop": "cancel",
    "delete": "cancel",
    "torchrun": "run",
    "start": "up",
    "nodes": "node",
    "apply": "submit",
    "create": "submit",
    "show": "describe",
    "inspect": "describe",
    "log": "logs",
    "watch": "events",
    "why": "explain",
    "incident": "explain",
}


def entries() -> Iterator[Entry]:
    for _, section in SECTIONS:
        yield from section


def find(name: str) -> Entry | None:
    return next((entry for entry in entries() if entry.name == name), None)


def closest(name: str) -> str | None:
    """The command that was probably meant."""
    if name in SYNONYMS:
        return SYNONYMS[name]
    import difflib

    near = difflib.get_close_matches(name, [entry.name for entry in entries()], n=1, cutoff=0.6)
    return near[0] if near else None


def exit_codes() -> tuple[tuple[int, str], ...]:
    """Every exit code with its meaning, from the errors' own tree."""
    meanings = {
        0: "done",
        1: "something else went wrong",
        2: "a wrong option, file or job spec",
        3: "no such job, node or incident",
        4: "refused: the state or your role does not allow it",
        5: "the controller cannot be reached",
        6: "timed out",
        7: "the job ended without success",
        130: "interrupted (128 + signal for run, else the script's own code)",
    }
    known = {KeepstepError.exit_code, *(kind.exit_code for kind in _descendants(KeepstepError))}
    assert known <= set(meanings), known - set(meanings)
    return tuple(sorted(meanings.items()))


def _descendants(kind: type[KeepstepError]) -> Iterator[type[KeepstepError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _descendants(below)


def help_text() -> str:
    """What `keepstep --help` prints."""
    lines = [
        "Usage: keepstep [--context NAME] COMMAND ...",
        "",
        "Keeps every rank of a training job in step: schedules, watches and recovers.",
    ]
    for title, section in SECTIONS:
        lines += ["", f"{title}:"]
        lines += [f"  {entry.name:<12}{entry.summary}" for entry in section]
    lines += ["", "Options:"]
    lines += [f"  {option:<23}{meaning}" for option, meaning in OPTIONS]
    lines += ["", "Jobs are named by id, a unique prefix of it, their name (the newest), or @last."]
    lines += ["", "Exit codes:"]
    lines += [f"  {code:>3}  {meaning}" for code, meaning in exit_codes()]
    return "\n".join(lines) + "\n"
