"""From a file to a job: defaults, paths, files that are none."""

import dataclasses
from pathlib import Path

import pytest

from keepstep.core.errors import InputError
from keepstep.core.job import UNLIMITED, CommandRun, EnvSource, LlamaRun, SecretRef, Stop, Warn
from keepstep.core.layout import Layout
from keepstep.spec import SpecError, command_spec, load

PRODUCT_PAGE = """\
name: llama3-8b
queue: research
priority: 50
pool: local
resources:
  nodes: 2
  gpus_per_node: 4
  spares: 1
parallelism: {tp: 2, pp: 2, dp: 2, cp: 1}
elastic: {min_dp: 1}
run:
  llama:
    model: debug
    data: {source: stdlib}
    steps: 120
    batch: {global_tokens: 1024, seq: 256}
checkpoint:
  dir: ./checkpoints
  every: auto
  snapshot_every: auto
recovery:
  hang_after: auto
  hang_after_unknown: 10m
  restarts: {max: 20, per: 24h}
notify: ["slack://...", "mailto://..."]
"""

ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in ("ab", "bc", "cd", "de", "ef")
)


def llama(text: str = "run: {llama: {}}", *overrides: str) -> LlamaRun:
    run = load(text, None, overrides).run
    assert isinstance(run, LlamaRun)
    return run


def command(text: str, *overrides: str) -> CommandRun:
    run = load(text, None, overrides).run
    assert isinstance(run, CommandRun)
    return run


def test_the_product_page(tmp_path: Path) -> None:
    file = tmp_path / "llama3.yaml"
    file.write_text(PRODUCT_PAGE)
    spec = load(file)
    assert (spec.name, spec.queue, spec.priority, spec.pool) == ("llama3-8b", "research", 50, "local")
    assert (spec.resources.nodes, spec.resources.gpus_per_node, spec.resources.spares) == (2, 4, 1)
    assert spec.parallelism == Layout(tp=2, pp=2, dp=2)
    assert spec.replica_counts == (2, 1)
    assert spec.checkpoint.dir == str(tmp_path / "checkpoints")
    assert spec.checkpoint.auto
    assert spec.recovery.hang_after_s is None
    assert spec.recovery.hang_after_unknown_s == 600
    assert (spec.recovery.restarts.max, spec.recovery.restarts.per_s) == (20, 86_400)
    assert spec.recovery.fenced, "the built-in trainer's writes are fenced"
    assert spec.notify == ("slack://...", "mailto://...")


def test_every_default_but_run(tmp_path: Path) -> None:
    file = tmp_path / "My Run_2.yaml"
    file.write_text("run: {command: [python, train.py]}")
    spec = load(file)
    assert spec.name == "my-run-2"
    assert isinstance(spec.run, CommandRun)
    assert spec.run.workdir == str(tmp_path)
    assert spec.run.ship == "bundle"
    assert spec.run.stop == Stop(signal="TERM", grace_s=30)
    assert spec.run.warn is None
    assert spec.checkpoint.dir is None
    assert not spec.recovery.fenced
    assert spec.parallelism == Layout()


def test_defaults_of_the_trainer_follow_the_preset() -> None:
    run = llama("run: {llama: {model: 405b, steps: 1200000}}")
    assert run.optimizer.lr == 8e-5
    assert run.optimizer.min_lr == pytest.approx(8e-7)  # the paper's figures
    assert run.optimizer.warmup_steps == 8000
    assert run.batch.seq == 4096
    assert (run.optimizer.beta1, run.optimizer.beta2) == (0.9, 0.95)
    assert llama("run: {llama: {steps: 50}}").optimizer.warmup_steps == 5


def test_the_default_batch_fills_the_pipeline() -> None:
    text = "{resources: {gpus_per_node: 8}, parallelism: {pp: 4}, run: {llama: {}}}"
    spec = load(text)
    assert isinstance(spec.run, LlamaRun)
    assert spec.run.batch.micro_batches(spec.parallelism.dp) == 8


def test_a_preset_may_be_changed() -> None:
    run = llama("run: {llama: {model: {preset: debug, layers: 2, max_seq: 64}}}")
    assert (run.model.preset, run.model.layers, run.model.dim, run.batch.seq) == ("debug", 2, 256, 64)


def test_units_become_seconds_bytes_and_names() -> None:
    run = command(
        """
        run:
          command: python -m package.train
          stop: {signal: sigint, grace: 1m30s}
          warn: {before: 500ms}
          umask: 027
          limits: {nofile: 65536, memlock: unlimited, stack: 8MiB}
          logs: {size: 1GB, files: 1}
          env_from: [{file: /etc/train.env}, {env: "NCCL_*"}]
          secrets: {HF_TOKEN: {file: /run/hf}, W: {env: W}, K: {kubernetes: {secret: s, key: k}}}
        """
    )
    assert run.stop == Stop(signal="INT", grace_s=90)
    assert run.warn == Warn(signal="USR1", before_s=0.5)
    assert run.umask == 0o027
    assert run.limits == {"nofile": 65_536, "memlock": UNLIMITED, "stack": 8 * 2**20}
    assert (run.logs.bytes, run.logs.files) == (10**9, 1)
    assert run.env_from == (
        EnvSource(source="file", name="/etc/train.env"),
        EnvSource(source="env", name="NCCL_*"),
    )
    assert run.secrets == {
        "HF_TOKEN": SecretRef(source="file", name="/run/hf"),
        "W": SecretRef(source="env", name="W"),
        "K": SecretRef(source="kubernetes", name="s", key="k"),
    }


@pytest.mark.parametrize(
    ("written", "seconds", "steps"), [("auto", None, None), ("30m", 1800.0, None), ("500 steps", None, 500)]
)
def test_checkpoint_intervals(written: str, seconds: float | None, steps: int | None) -> None:
    checkpoint = load(f"{{run: {{llama: {{}}}}, checkpoint: {{every: {written}}}}}").checkpoint
    assert (checkpoint.every_s, checkpoint.every_steps) == (seconds, steps)


@pytest.mark.parametrize(
    ("words", "argv", "is_python"),
    [
        (("python", "train.py", "-v"), ("train.py", "-v"), True),
        (("python3.11", "-m", "a.b"), ("-m", "a.b"), True),
        (("/usr/bin/python3", "train.py"), ("train.py",), True),
        (("train.py", "-v"), ("train.py", "-v"), True),
        (("python", "-u", "train.py"), ("python", "-u", "train.py"), False),
        (("python",), ("python",), False),
        (("python", "-m"), ("python", "-m"), False),
        (("./train", "--fast"), ("./train", "--fast"), False),
        (("pythonic", "x.py"), ("pythonic", "x.py"), False),
    ],
)
def test_what_a_warm_interpreter_can_run(
    words: tuple[str, ...], argv: tuple[str, ...], is_python: bool
) -> None:
    run = CommandRun(command=words, workdir="/")
    assert (run.argv, run.is_python) == (argv, is_python)


def test_paths_are_made_absolute() -> None:
    text = "{run: {llama: {data: {source: text, path: ../data}, init_from: ./b}}, checkpoint: {dir: ../../c}}"
    spec = load(text, base_dir=Path("/home/someone/job"))
    assert isinstance(spec.run, LlamaRun)
    assert spec.run.data.path == "/home/someone/data"
    assert spec.run.init_from == "/home/someone/job/b"
    assert spec.checkpoint.dir == "/home/c"


def test_a_job_with_fewer_replicas_takes_fewer_nodes() -> None:
    sizes = "resources: {nodes: 4, gpus_per_node: 2}, parallelism: {tp: 2, dp: 4}, elastic: {min_dp: 1}"
    spec = load(f"{{{sizes}, run: {{llama: {{}}}}}}")
    assert spec.replica_counts == (4, 2, 1)
    assert [spec.nodes_for(dp) for dp in spec.replica_counts] == [4, 2, 1]


def test_run_in_torchruns_place(tmp_path: Path) -> None:
    spec = command_spec(
        name="Train.py", command=["train.py", "--lr", "1"], nproc=2, workdir=tmp_path, env={"A": "true"},
        overrides=["recovery.restarts.max=3", "run.warm=never"],
    )  # fmt: skip
    assert isinstance(spec.run, CommandRun)
    assert (spec.name, spec.run.command, spec.run.ship) == ("train", ("train.py", "--lr", "1"), "none")
    assert spec.run.env_from == (EnvSource(source="env", name="*"),), (
        "named, so that no value gets into the store"
    )
    assert (spec.run.env, spec.run.warm, spec.recovery.restarts.max) == ({"A": "true"}, "never", 3)
    assert spec.parallelism.world_size == 2


def test_a_wrong_word_of_run_is_told_without_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^keepstep run: run\.env\.RANK: is taken"):
        command_spec(name="a", command=["a.py"], nproc=1, workdir=tmp_path, env={"RANK": "0"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x02\x01\x01\x00", "NUL"),
        (b"name: caf\xe9\n", "byte 9 is not UTF-8"),
        ("name: a".encode("utf-16"), "UTF-16"),
        (b"# " + b"x" * 300_000, "at most 256 KiB"),
        (b"name: a\x07\n", "U+0007 may not stand in YAML"),
        (b"[" * 5000, "nested too deeply"),
        (b"", "is empty"),
        (ALIASES.encode(), "too many values"),
    ],
    ids=["binary", "latin-1", "utf-16", "large", "control", "deep", "empty", "aliases"],
)  # fmt: skip
def test_files_that_are_no_specs(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes("name: marked\nrun: {llama: {}}\n".encode("utf-8-sig"))
    assert load(file).name == "marked"


def test_several_problems_keep_their_order_and_their_parts() -> None:
    with pytest.raises(SpecError) as caught:
        load("priority: high\nresources: {nodes: 0}\nrun: {llama: {}}", "job.yaml")
    error = caught.value
    assert [problem.path for problem in error.problems] == [("priority",), ("resources", "nodes")]
    assert str(error).splitlines()[-1] == "2 problems."
    assert error.exit_code == 2


def test_a_value_given_on_the_command_line_is_never_repeated_by_its_override() -> None:
    with pytest.raises(InputError) as caught:
        load("run: {llama: {}}", None, ["run.env.X.Y=hunter2", "run.secrets.K=hunter2"])
    assert "hunter2" not in str(caught.value)


def test_the_values_of_secrets_are_in_no_message() -> None:
    text = "run: {command: [a], secrets: {K: hunter2}, env: {WANDB_API_KEY: hunter3, X: [hunter4]}}"
    with pytest.raises(InputError) as caught:
        load(text)
    assert "hunter2" not in str(caught.value)
    assert "hunter3" not in str(caught.value)


def test_specs_are_values() -> None:
    spec = load(PRODUCT_PAGE)
    assert spec == load(PRODUCT_PAGE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]
