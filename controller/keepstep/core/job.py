"""A job as everything behind the front door sees it: resolved, checked, immutable.

What people write is a document with defaults, units and conveniences (`keepstep.spec`); loading it gives
one `JobSpec`, in which every default is filled in, every duration is in seconds, every size in bytes,
every path absolute where it can be, and the layout is known to multiply out and to fit the model. The
store keeps it as a plain dictionary (`keepstep.spec.to_dict`). Values of secrets are never in it: only
where each node finds them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from keepstep.core.layout import Layout

UNLIMITED = -1  # of a limit, as setrlimit(2) has it
_PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    nodes: int = 1
    gpus_per_node: int = 1  # slots, on a machine without GPUs
    spares: int = 0  # nodes kept warm beside the gang
    labels: Mapping[str, str] = field(default_factory=dict)  # that nodes must have: value, !value, in(a,b)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    min_dp: int = 1  # equal to the layout's dp: the job never shrinks


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's: rotary waves that are long within the original length are slowed down by `factor`."""

    factor: float
    low_freq_factor: float = 1.0  # turns within the original length, up to which a wave is slowed down ...
    high_freq_factor: float = 4.0  # ... and from which on it stays
    original_max_position_embeddings: int = 8192  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama 3 transformer: RMSNorm, grouped-query attention, SwiGLU, rotary positions, no tied tables."""

    preset: str | None = None  # the name it was taken from, perhaps changed since; None: written out
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int
    max_seq: int = 8192  # positions beyond it have no rotation
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def embedding_parameters(self) -> int:
        """Of the input table, which does no arithmetic; the output table has as many and does."""
        return self.vocabulary * self.dim

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head_dim
        return attention + 3 * self.dim * self.ffn_dim + 2 * self.dim

    @property
    def parameters(self) -> int:
        return 2 * self.embedding_parameters + self.layers * self.layer_parameters + self.dim

    def flops_per_token(self, seq: int) -> float:
        """Forward and backward, causal sparsity not credited: 6 (N - N_embedding) + 12 L D S."""
        return 6.0 * (self.parameters - self.embedding_parameters) + 12.0 * self.layers * self.dim * seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    source: Literal["stdlib", "text", "tokens"] = "stdlib"
    path: str | None = None  # of source text or tokens: a file or a folder on the nodes
    seed: int = 0
    tokenizer: str | None = None  # its file on the nodes; None: bytes, or what made the tokens
    weights: Mapping[str, float] = field(default_factory=dict)  # of source tokens: by source; none: alike
    holdout: float = 0.0  # share of documents that is never trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """What one optimizer step sees."""

    global_tokens: int  # of one optimizer step, over all replicas; never changed by recovery
    seq: int  # tokens of a sequence
    micro_batch: int = 1  # sequences that go through the pipeline together

    @property
    def sequences(self) -> int:
        return self.global_tokens // self.seq

    def micro_batches(self, dp: int) -> int:
        """Of one replica in one step, when there are `dp` of them."""
        return self.sequences // dp // self.micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStage(BatchSizes):
    """A later stage of training, with another batch."""

    after_steps: int  # completed ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(BatchSizes):
    """That of the first stage, and the later stages in their order."""

    stages: tuple[BatchStage, ...] = ()

    @property
    def all(self) -> tuple[BatchSizes, ...]:
        return (self, *self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW with linear warm-up and cosine decay."""

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int | None = None  # at which the cosine ends; None: where annealing begins
    anneal_steps: int = 0  # the last ones, over which the rate goes to nothing in a line
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # of the global gradient norm; 0: not clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRef:
    """Where a node finds the value of a secret; the value itself is nobody else's business."""

    source: Literal["file", "env", "kubernetes"]
    name: str  # path of the file on the node, variable of the agent, or name of the Kubernetes secret
    key: str | None = None  # within the Kubernetes secret


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSource:
    """Many variables at once, read on the node."""

    source: Literal["file", "env", "kubernetes"]
    name: str  # a file of NAME=value lines, a variable of the agent ("NCCL_*": all that match), a config map


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    signal: str = "TERM"
    grace_s: float = 30.0  # then SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Warn:
    """A signal sent ahead of a stop that is known beforehand (preemption, drain, suspend)."""

    signal: str = "USR1"
    before_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """Of one rank on its node: `files` of at most `bytes` each."""

    bytes: int = 64 * 2**20
    files: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What both kinds of run have in common: how each rank's process is set up and ended."""

    env: Mapping[str, str] = field(default_factory=dict)
    env_from: tuple[EnvSource, ...] = ()
    secrets: Mapping[str, SecretRef] = field(default_factory=dict)
    user: str | None = None  # None: the agent's own
    umask: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)  # "nofile", "core", ...: value or UNLIMITED
    stop: Stop = Stop()
    warn: Warn | None = None
    warm: Literal["auto", "never"] = "auto"  # start ranks from a process that has torch loaded
    preload: tuple[str, ...] = ()  # modules that process imports, beside what keepstep knows by itself
    hook: bool = True  # progress and evidence from inside of unchanged scripts
    logs: Logs = Logs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How the built-in trainer's layers are cut into chunks, and in which order the chunks are run."""

    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    chunks: int = 1  # of the model on each pipeline rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """What the built-in trainer computes in, what it computes twice, what it compiles."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    shard: Literal["optimizer", "gradients", "parameters"] = (
        "optimizer"  # over dp x cp, each with those before
    )
    compile: bool = False
    float8: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss on text that is not trained on, now and then."""

    every_steps: int  # and at the end
    sequences: int = 256  # of each source, at most
    data: Data | None = None  # None: what data.holdout holds out


@dataclass(frozen=True, slots=True, kw_only=True)
class Wandb:
    """What wandb.init takes; None: its own default."""

    project: str
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] | None = None
    dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Where the rank that reports writes the job's figures beside; its packages are the node's to have."""

    tensorboard: str | None = None  # a folder, in which each job has its own
    wandb: Wandb | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaRun(Process):
    """The built-in trainer."""

    model: ModelShape
    data: Data = Data()
    steps: int
    batch: Batch
    optimizer: Optimizer
    pipeline: Pipeline = Pipeline()
    numerics: Numerics = Numerics()
    evaluation: Evaluation | None = None
    metrics: Metrics = Metrics()
    seed: int = 0
    init_from: str | None = None  # a folder of weights to begin with; None: random ones
    kind: Literal["llama"] = "llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRun(Process):
    """Any command that runs under torchrun, unchanged; started once for each rank."""

    command: tuple[str, ...]  # as the user would type it without torchrun: python train.py --epochs 3
    workdir: str  # absolute; with ship "none" a path on the nodes
    ship: Literal["bundle", "none"] = "bundle"
    bundle: str | None = None  # sha256 of the shipped workdir, filled in by submit
    python: str | None = None  # interpreter on the node; None: the agent's own
    kind: Literal["command"] = "command"

    @property
    def is_python(self) -> bool:
        """Whether an interpreter that is already warm can run it: a script or a module, no flags before."""
        return self._python_arguments() is not None

    @property
    def argv(self) -> tuple[str, ...]:
        """For launch.json: ("-m", module, ...) or (script, ...) if is_python, else the command."""
        arguments = self._python_arguments()
        return self.command if arguments is None else arguments

    def _python_arguments(self) -> tuple[str, ...] | None:
        first, *rest = self.command
        if first.endswith(".py"):
            return self.command
        if _PYTHON.fullmatch(first) is None or not rest:
            return None
        named = rest[0] == "-m" and len(rest) > 1
        return tuple(rest) if named or not rest[0].startswith("-") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where and how often. Neither interval set: from measured cost and failure rate (auto)."""

    dir: str | None  # absolute path; None: a command that keeps its own, or none
    every_s: float | None = None
    every_steps: int | None = None
    keep: int = 3
    snapshot_every_steps: int | None = None  # in memory; None: auto, 0: never

    @property
    def auto(self) -> bool:
        return self.every_s is None and self.every_steps is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Budget of restarts for failures that are blamed on the job."""

    max: int = 20
    per_s: float = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Before a restart that follows a failure without a step in between; the first is not delayed."""

    first_s: float = 1.0
    factor: float = 2.0
    max_s: float = 60.0

    def delay_s(self, fruitless: int) -> float:
        """After `fruitless` attempts in a row that made no step."""
        if fruitless <= 0:
            return 0.0
        # The exponent is bounded so that no count of failures can overflow a float.
        return float(min(self.max_s, self.first_s * self.factor ** min(fruitless - 1, 64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    hang_after_s: float | None = None  # None: learnt from the job's own phases
    hang_after_unknown_s: float = 600.0  # in a phase never seen before
    start_within_s: float = 600.0  # for every node to be prepared; then those that are not are given up
    restarts: Restarts = Restarts()
    backoff: Backoff = Backoff()
    no_progress_max: int = 10  # attempts in a row without a step, whoever is to blame
    on_loss_spike: str = "tell"  # or "skip": back to before it, and the second time without its batches
    fenced: bool = False  # late writes of an old attempt do no harm (always so for the built-in trainer)
    self_fence_s: float = 30.0  # a node without controller and without a step ends its ranks after this
    orphan_lease_s: float = 1800.0  # for how long a gang none of whose nodes answers is left in peace


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    name: str
    project: str = "default"
    queue: str = "default"
    priority: int = 0  # higher runs first
    pool: str = "local"
    resources: Resources = Resources()
    parallelism: Layout = field(default_factory=Layout)
    elastic: Elastic = Elastic()
    run: LlamaRun | CommandRun
    checkpoint: Checkpoint
    recovery: Recovery = Recovery()
    notify: tuple[str, ...] = ()
    validates: tuple[str, ...] = ()  # keepstep's own job on just these nodes, whatever their life says

    @property
    def replica_counts(self) -> tuple[int, ...]:
        """Numbers of replicas this job may run with, largest first.

        They divide the number asked for, so that each replica stands for the same number of virtual ones.
        """
        dp = self.parallelism.dp
        return tuple(k for k in range(dp, self.elastic.min_dp - 1, -1) if dp % k == 0)

    def nodes_for(self, dp: int) -> int:
        """The fewest nodes that hold `dp` replicas with the same number of ranks on each."""
        world, slots = dp * self.parallelism.replica_size, self.resources.gpus_per_node
        nodes = -(-world // slots)
        while world % nodes:
            nodes += 1
        return nodes
