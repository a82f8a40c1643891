"""Fields of `run` that are each right and together wrong, and values that do not belong into a spec."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keepstep.spec.problems import Path, Problem
from keepstep.spec.run_document import LlamaSection, RunSection, TextSection

# What keepstep itself tells every rank. A trailing * stands for any end.
RESERVED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "TORCHELASTIC_*", "KEEPSTEP_*",
)  # fmt: skip
_LAUNCHERS = ("torchrun", "mpirun", "mpiexec", "srun", "deepspeed")
_TORCHRUN = ("torch.distributed.run", "torch.distributed.launch")
# How tokens of well-known services begin, and keys in text.
_TOKEN = re.compile(
    r"\b(hf_\w{20}|sk-[\w-]{20}|gh[pousr]_\w{20}|github_pat_\w{20}|glpat-[\w-]{15}|xox[abpr]-[\w-]{10}|AKIA[A-Z0-9]{12})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRETIVE = re.compile(
    r"(^|_)(PASSWORD|PASSWD|SECRET|SECRET_KEY|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH_TOKEN)$"
)
_SECRETS_OF_SERVICES = frozenset(
    {"WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
)


def conflicts(run: RunSection) -> Iterator[Problem]:
    yield from _kind_problems(run)
    yield from _reference_problems(run)
    if run.llama is not None:
        yield from _data_problems(run.llama)
        yield from _schedule_problems(run.llama)
        yield from _stage_problems(run.llama)
    yield from value_problems(run.env, run.secrets, run.command or run.args)


def value_problems(
    env: Mapping[str, str], secrets: Mapping[str, Any], words: Sequence[str]
) -> Iterator[Problem]:
    """Variables that are keepstep's own, and secrets where everybody can read them."""
    for at, variables in ((("run", "env"), env), (("run", "secrets"), secrets)):
        for variable in variables:
            if is_reserved(variable):
                why = "keepstep sets it for every rank"
                yield Problem(
                    path=(*at, variable), what="is taken", why=why, next="Leave it out.", at_key=True
                )
    for variable, value in env.items():
        known = variable in _SECRETS_OF_SERVICES or _SECRETIVE.search(variable)
        if value and (known or _TOKEN.search(value)):
            next_ = (
                f"Write under run.secrets   {variable}: {{file: /path/on/the/node}}   or {{env: {variable}}}"
            )
            next_ = f"{next_} (of the node's agent)."
            yield Problem(path=("run", "env", variable), what=_BARE, why=_SEEN, next=next_)
    for index, word in enumerate(words):
        if _TOKEN.search(word):
            next_ = "Let the script read a variable, and say under run.secrets where nodes find it."
            yield Problem(path=("run", "command", index), what=_BARE, why=_SEEN, next=next_)


_BARE = "looks like a secret itself"
_SEEN = "specs are stored and shown to everybody who may see the job"


def is_reserved(variable: str) -> bool:
    """KEEPSTEP_HOOK=0 is a job's to say, as `run.hook` is."""
    return variable != "KEEPSTEP_HOOK" and any(
        variable.startswith(each[:-1]) if each.endswith("*") else variable == each for each in RESERVED
    )


def _kind_problems(run: RunSection) -> Iterator[Problem]:
    at: Path = ("run",)
    given = [kind for kind in ("llama", "command", "module") if getattr(run, kind) is not None]
    if len(given) != 1:
        what = f"has {' and '.join(given)}, and only one can run" if given else "says nothing to run"
        yield Problem(path=at, what=what, next="Give one of llama, command, module.")
    if run.command == ():
        yield Problem(path=(*at, "command"), what="is empty", next="As in [python, train.py].")
    if run.module is None and run.args:
        yield Problem(path=(*at, "args"), what="belong to module", next="Append them to the command.")
    if run.llama is not None:
        for field in ("workdir", "ship", "python"):
            if field in run.model_fields_set:
                why = "the built-in trainer is on the nodes already"
                yield Problem(
                    path=(*at, field), what="is for commands", why=why, next="Leave it out.", at_key=True
                )
    if run.command:
        yield from _launcher_problems(run.command)


def _launcher_problems(command: Sequence[str]) -> Iterator[Problem]:
    first = command[0].rsplit("/", 1)[-1]
    if not command[0].strip():
        yield Problem(path=("run", "command"), what="begins with an empty word")
    launcher = first if first in _LAUNCHERS else ""
    if first.startswith("python") and list(command[1:2]) == ["-m"]:
        launcher = next(
            (m for m in ("torch.distributed.run", "torch.distributed.launch") if m in command[2:3]), ""
        )
    launcher = "accelerate launch" if tuple(command[:2]) == ("accelerate", "launch") else launcher
    if launcher:
        why = "keepstep starts one process for each rank by itself"
        next_ = "Write what follows it, as in [python, train.py, ...]; resources say how many ranks."
        yield Problem(path=("run", "command"), what=f"starts {launcher}", why=why, next=next_)


def _data_problems(section: LlamaSection) -> Iterator[Problem]:
    at: Path = ("run", "llama", "data")
    yield from _text_problems(section.data, at)
    evaluation = section.evaluation
    if evaluation is None:
        return
    if evaluation.data is not None:
        yield from _text_problems(evaluation.data, ("run", "llama", "evaluation", "data"))
    elif not section.data.holdout:
        what = "has no text that is not trained on"
        next_ = "Hold some out, as in   run.llama.data: {holdout: 0.01}   or give it data of its own."
        yield Problem(path=("run", "llama", "evaluation"), what=what, next=next_)


def _text_problems(data: TextSection, at: Path) -> Iterator[Problem]:
    if data.source != "stdlib" and data.path is None:
        yield Problem(
            path=at, what=f"source {data.source} needs a path", next="A file or a folder, on every node."
        )
    if data.source == "stdlib" and data.path is not None:
        yield Problem(path=(*at, "path"), what="is for source text", next="Add   source: text")
    if data.source != "tokens" and data.weights:
        yield Problem(
            path=(*at, "weights"),
            what="is for source tokens",
            next="Make them with `keepstep data tokenize`.",
        )


def _schedule_problems(section: LlamaSection) -> Iterator[Problem]:
    at: Path = ("run", "llama", "optimizer")
    steps, optimizer = section.steps, section.optimizer
    warmup = optimizer.warmup_steps or 0
    if optimizer.anneal_steps and warmup + optimizer.anneal_steps > steps:
        why = f"{warmup:,} of the {steps:,} steps warm up"
        what = f"{optimizer.anneal_steps:,} steps are too many"
        yield Problem(path=(*at, "anneal_steps"), what=what, why=why, next="Lower one of them.")
    if optimizer.decay_steps is not None and optimizer.decay_steps <= warmup:
        what = f"{optimizer.decay_steps:,} is no later than warmup_steps, {warmup:,}"
        yield Problem(path=(*at, "decay_steps"), what=what, next="The cosine begins where warming up ends.")


def _stage_problems(section: LlamaSection) -> Iterator[Problem]:
    for number, stage in enumerate(section.batch.stages):
        given = [name for name in ("after_tokens", "after_steps") if getattr(stage, name) is not None]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "does not say when it begins"
            at: Path = ("run", "llama", "batch", "stages", number)
            yield Problem(path=at, what=what, next="Give one of after_tokens, after_steps.")


def _reference_problems(run: RunSection) -> Iterator[Problem]:
    for index, section in enumerate(run.env_from):
        yield from _one_of(section, ("run", "env_from", index))
    for variable, secret in run.secrets.items():
        yield from _one_of(secret, ("run", "secrets", variable))
        if variable in run.env:
            what = "is a secret and also in run.env"
            yield Problem(path=("run", "secrets", variable), what=what, next="Keep one of them.", at_key=True)


def _one_of(section: Any, path: Path) -> Iterator[Problem]:
    names = ("file", "env", "kubernetes")
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        what = f"has {' and '.join(given)}" if given else "says no place"
        yield Problem(path=path, what=what, next=f"Give one of {', '.join(names)}.")
