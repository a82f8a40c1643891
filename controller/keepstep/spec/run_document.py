"""The `run` part of the document: the built-in trainer or a command, and how its processes are set up."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from keepstep.core import job
from keepstep.spec import scalars
from keepstep.spec.fields import (
    Bytes,
    Kind,
    Limit,
    Module,
    Number,
    Seconds,
    Signal,
    SomeText,
    Text,
    Truth,
    Variable,
    Whole,
)
from keepstep.spec.llama_document import BatchStageSection, MetricsSection, RopeScalingSection
from keepstep.spec.presets import BYTE_VOCABULARY, PRESETS
from keepstep.spec.section import Section, Words

_SOURCES = ("stdlib", "text", "tokens")
_STOP, _WARN, _LOGS = job.Stop(), job.Warn(), job.Logs()
_EVALUATION = job.Evaluation(every_steps=1)
_OPTIMIZER = job.Optimizer(lr=0, min_lr=0, warmup_steps=0)
_SHAPE = job.ModelShape(dim=1, layers=1, heads=1, kv_heads=1, ffn_dim=1, vocabulary=1)


class ModelSection(Section):
    """A Llama 3 model: a preset by its name, a preset with changes, or all the fields."""

    preset: Annotated[str, BeforeValidator(scalars.one_of(*PRESETS)), Kind("a preset", "8b")] | None = Field(
        default=None, json_schema_extra={"enum": [*PRESETS, None]}
    )
    """The model to take every field from that is not given beside it."""
    dim: Annotated[Whole, Field(ge=2, le=2**17)] | None = None
    """Width of the residual stream."""
    layers: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    """Number of transformer blocks."""
    heads: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    """Query heads of a layer."""
    kv_heads: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    """Key and value heads of a layer; each serves heads / kv_heads query heads."""
    ffn_dim: Annotated[Whole, Field(ge=1, le=2**20)] | None = None
    """Inner width of the feed-forward part."""
    vocabulary: Annotated[Whole, Field(ge=1, le=2**24)] | None = Field(
        default=None, json_schema_extra={"default_text": f"the preset's, else {BYTE_VOCABULARY} (bytes)"}
    )
    """Number of token ids."""
    max_seq: Annotated[Whole, Field(ge=1, le=2**24)] | None = Field(
        default=None, json_schema_extra={"default_text": f"the preset's, else {_SHAPE.max_seq}"}
    )
    """Longest sequence, in tokens, for which positions are prepared."""
    rope_theta: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, json_schema_extra={"default_text": f"the preset's, else {_SHAPE.rope_theta:,.0f}"}
    )
    """Base of the rotary position frequencies."""
    norm_eps: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, json_schema_extra={"default_text": f"the preset's, else {_SHAPE.norm_eps:g}"}
    )
    """Added to the mean square in RMSNorm."""
    rope_scaling: RopeScalingSection | None = Field(
        default=None, json_schema_extra={"default_text": "the preset's, else none"}
    )
    """How rotary positions are scaled for long sequences, as in Llama 3.1."""

    @classmethod
    def short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"preset": scalars.one_of(*PRESETS)(value)}
        return super().short(value)


class TextSection(Section):
    """Text with document boundaries, which attention does not cross."""

    source: Annotated[
        Literal["stdlib", "text", "tokens"],
        BeforeValidator(scalars.one_of(*_SOURCES)),
        Kind("a word", "stdlib"),
    ] = "stdlib"
    """stdlib: the source files of the Python that runs the ranks. text: files of your own. tokens: a folder
    that `keepstep data tokenize` made."""
    path: SomeText | None = None
    """Of source text: a file, or a folder of text files; of source tokens: the folder. On every node."""
    tokenizer: SomeText | None = Field(
        default=None, json_schema_extra={"default_text": "bytes, or the one that made the tokens"}
    )
    """Llama 3's tokenizer.model or tokenizer.json, on every node."""
    weights: dict[SomeText, Annotated[Number, Field(gt=0)]] = Field(default_factory=dict)
    """Of source tokens: how much is taken of each of its sources, in any unit; left out: alike of all."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Of the order of documents."""

    @classmethod
    def short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"source": scalars.one_of(*_SOURCES)(value)}
        return super().short(value)


class DataSection(TextSection):
    """What is trained on: text with document boundaries, which attention does not cross."""

    holdout: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """Share of documents, chosen by the hash of each one's content, that is never trained on; `evaluation`
    uses it."""


class EvaluationSection(Section):
    """The loss on text that is not trained on: of each source, the same sequences every time."""

    every_steps: Annotated[Whole, Field(ge=1, le=10**9)]
    """Optimizer steps between two evaluations; one more is made at the end."""
    sequences: Annotated[Whole, Field(ge=1, le=2**30)] = _EVALUATION.sequences
    """Of each source, at most; they are as long as those that are trained on."""
    data: TextSection | None = Field(
        default=None, json_schema_extra={"default_text": "what run.llama.data.holdout holds out"}
    )
    """Other text than that which is trained on."""


class BatchSection(Section):
    """How much one optimizer step sees."""

    global_tokens: Annotated[Whole, Field(ge=1, le=2**40)] | None = Field(
        default=None,
        json_schema_extra={"default_text": "two micro-batches for each pipeline stage of each replica"},
    )
    """Tokens of one optimizer step over all replicas; recovery never changes it."""
    seq: Annotated[Whole, Field(ge=1, le=2**24)] | None = Field(
        default=None, json_schema_extra={"default_text": "the preset's: 256 on a CPU model, 8,192 for most"}
    )
    """Tokens of a sequence."""
    micro_batch: Annotated[Whole, Field(ge=1, le=2**20)] = 1
    """Sequences that go through the model together."""
    stages: tuple[BatchStageSection, ...] = ()
    """Later stages of training, with more tokens a step or longer sequences; name all of them when the job
    begins, because the text that a stage takes depends on where it ends."""


class OptimizerSection(Section):
    """AdamW, with linear warm-up, cosine decay, and annealing at the end."""

    lr: Annotated[Number, Field(gt=0, le=10)] | None = Field(
        default=None, json_schema_extra={"default_text": "the preset's, as published"}
    )
    """Learning rate at the peak."""
    min_lr: Annotated[Number, Field(ge=0, le=10)] | None = Field(
        default=None, json_schema_extra={"default_text": "a hundredth of lr"}
    )
    """Learning rate where the cosine ends."""
    warmup_steps: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, json_schema_extra={"default_text": "a tenth of the steps, at most 8,000"}
    )
    """Steps until the peak."""
    decay_steps: Annotated[Whole, Field(ge=1, le=10**9)] | None = Field(
        default=None, json_schema_extra={"default_text": "all steps before annealing"}
    )
    """The step at which the cosine ends; past it the rate stays at min_lr."""
    anneal_steps: Annotated[Whole, Field(ge=0, le=10**9)] = _OPTIMIZER.anneal_steps
    """The last steps, over which the learning rate goes to nothing in a line."""
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = _OPTIMIZER.weight_decay
    """Decay of matrices, as a share of the learning rate; norms do not decay."""
    betas: tuple[
        Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]
    ] = (_OPTIMIZER.beta1, _OPTIMIZER.beta2)  # fmt: skip
    """Memory of the first and the second moment."""
    eps: Annotated[Number, Field(gt=0, le=1)] = _OPTIMIZER.eps
    """Added to the root of the second moment."""
    clip: Annotated[Number, Field(ge=0)] = _OPTIMIZER.clip
    """Largest norm of the whole gradient; 0: not clipped."""


class PipelineSection(Section):
    """How layers are cut into chunks, and in which order these are run; it changes speed and memory only."""

    schedule: Annotated[
        Literal["1f1b", "gpipe", "interleaved"],
        BeforeValidator(scalars.one_of("1f1b", "gpipe", "interleaved")),
        Kind("a word", "1f1b"),
    ] = "1f1b"
    """1f1b: backward passes as early as can be, so few activations are held. interleaved: the same with
    several chunks a rank: fewer idle ranks, more messages. gpipe: all forward passes first."""
    chunks: Annotated[Whole, Field(ge=1, le=256)] | None = Field(
        default=None, json_schema_extra={"default_text": "2 for interleaved, else 1"}
    )
    """Pieces of the model on each pipeline rank."""

    @classmethod
    def short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"schedule": scalars.one_of("1f1b", "gpipe", "interleaved")(value)}
        return super().short(value)


class NumericsSection(Section):
    """What is computed in which precision, twice, or compiled; sums, moments and the loss are always fp32."""

    precision: Annotated[
        Literal["auto", "bf16", "fp32"], BeforeValidator(scalars.one_of("auto", "bf16", "fp32")),
        Kind("a word", "bf16"),
    ] = "auto"  # fmt: skip
    """Of weights and activations while computing; auto: bf16 on GPUs, fp32 elsewhere."""
    recompute: Annotated[
        Literal["none", "selective", "full"], BeforeValidator(scalars.one_of("none", "selective", "full")),
        Kind("a word", "selective"),
    ] = "none"  # fmt: skip
    """What the backward pass computes again instead of keeping it. selective: what takes no matrices; full:
    each layer. A layer of 8b at 8,192 tokens keeps 1,142, 773 or 67 MB."""
    shard: Annotated[
        Literal["optimizer", "gradients", "parameters"],
        BeforeValidator(scalars.one_of("optimizer", "gradients", "parameters")),
        Kind("a word", "gradients"),
    ] = "optimizer"  # fmt: skip
    """What ranks of dp x cp share out, each with those before it (ZeRO 1, 2, 3). gradients: added layer by
    layer after each micro-batch. parameters: also gathered layer by layer, before each forward and backward
    pass. The less a rank holds, the more is sent."""
    compile: Truth = False
    """Compile the element-wise parts of each block, with torch.compile; the first step takes longer."""
    float8: Truth = False
    """Products of the layers' matrices in float8, with a scale for each row; gradients of weights, embedding,
    output and attention stay in bf16. On GPUs from Ada and Hopper on; not tried on any yet."""
    deterministic: Truth = False
    """The same bits in every run of the same layout, at some cost on GPUs; on CPUs it is always so."""


class LlamaSection(Section):
    """The built-in trainer: Llama 3 with tensor, context, pipeline and data parallelism."""

    model: ModelSection = ModelSection(preset="debug")
    """The model: the name of a preset (debug, 1b, 8b, 70b, 405b, 8b-3.1 and so on), or the fields."""
    data: DataSection = DataSection()
    """What is trained on: the name of a source, or its fields."""
    steps: Annotated[Whole, Field(ge=1, le=10**9)] = 100
    """Optimizer steps until the job is done; the learning rate decays over them."""
    batch: BatchSection = BatchSection()
    """How much one step sees."""
    optimizer: OptimizerSection = OptimizerSection()
    """How weights follow from gradients."""
    pipeline: PipelineSection = PipelineSection()
    """The pipeline: the name of a schedule, or its fields."""
    numerics: NumericsSection = NumericsSection()
    """Precision, memory and speed."""
    evaluation: EvaluationSection | None = None
    """When the loss on text that is not trained on is computed; left out: never."""
    metrics: MetricsSection = MetricsSection()
    """Where loss, rates and evaluations are written for other tools; keepstep has them in any case."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Of the first weights."""
    init_from: SomeText | None = None
    """A folder of weights to begin with, on every node; left out: random ones."""


class StopSection(Section):
    """How ranks are asked to end before they are ended."""

    signal: Signal = _STOP.signal
    """Sent to every rank."""
    grace: Annotated[Seconds, Field(ge=0)] = _STOP.grace_s
    """How long a rank has after the signal; then it is killed."""


class WarnSection(Section):
    """A signal ahead of a stop that is known beforehand: preemption, drain, suspend."""

    signal: Signal = _WARN.signal
    """Sent to every rank, which goes on."""
    before: Annotated[Seconds, Field(ge=0)] = _WARN.before_s
    """How long before the stop."""


class LogsSection(Section):
    """What a node keeps of a rank's output."""

    size: Annotated[Bytes, Field(ge=4096)] = _LOGS.bytes
    """Of one file; then it is set aside and another begun."""
    files: Annotated[Whole, Field(ge=1, le=100)] = _LOGS.files
    """How many are kept of each rank."""


class KubernetesKeySection(Section):
    """A key of a Kubernetes secret."""

    secret: SomeText
    """Name of the secret, in the job's namespace."""
    key: SomeText
    """Key within it."""


class SecretSection(Section):
    """Where each node finds a secret; its value is never written here, stored or shipped."""

    file: SomeText | None = None
    """A file on the node; its text, without the last line's end, is the value."""
    env: Variable | None = None
    """A variable in the environment of the node's agent."""
    kubernetes: KubernetesKeySection | None = None
    """A key of a Kubernetes secret."""

    @classmethod
    def short(cls, value: Any) -> Any:
        why = "specs are stored and shown to everybody who may see the job"
        next_ = "Write where the node finds it: {file: /path/on/the/node}, or {env: VARIABLE_OF_THE_AGENT}."
        raise scalars.wrong("holds the secret itself", why=why, next=next_)


class EnvFromSection(Section):
    """Many environment variables from one place."""

    file: SomeText | None = None
    """A file of NAME=value lines, on the node."""
    env: SomeText | None = None
    """A variable of the agent's environment, or many: NCCL_*."""
    kubernetes: SomeText | None = None
    """A Kubernetes config map, by name."""


class RunSection(Section):
    """What runs in each rank: llama (the built-in trainer), command, or module."""

    present_when_empty: ClassVar[frozenset[str]] = frozenset({"llama"})

    llama: LlamaSection | None = None
    """The built-in trainer; {} trains the debug model on this Python's own sources."""
    command: Words | None = None
    """Any command that runs under torchrun, as it would follow `torchrun`: started once for each rank."""
    module: Module | None = None
    """Instead of command: a module to be run as `python -m` does."""
    args: Words = ()
    """Of module: its arguments."""
    workdir: SomeText = "."
    """Where the command runs: a folder here that is shipped, or with `ship: none` a folder on the nodes."""
    ship: Annotated[
        Literal["bundle", "none"],
        BeforeValidator(scalars.one_of("bundle", "none")),
        Kind("a word", "none"),
    ] = "bundle"
    """bundle: workdir is packed and unpacked on every node. none: the nodes have it already."""
    python: SomeText | None = Field(default=None, json_schema_extra={"default_text": "the agent's own"})
    """The interpreter on the node, relative to workdir or absolute."""
    env: dict[Variable, Text] = Field(default_factory=dict)
    """Environment variables of every rank."""
    env_from: tuple[EnvFromSection, ...] = ()
    """More variables, read on each node; later ones win, `env` wins over all."""
    secrets: dict[Variable, SecretSection] = Field(default_factory=dict)
    """Variables with secret values: for each, where the node finds it."""
    user: SomeText | None = Field(default=None, json_schema_extra={"default_text": "the agent's own"})
    """The user that ranks run as; the agent must be root for another than its own."""
    umask: (
        Annotated[
            int,
            BeforeValidator(scalars.umask),
            WithJsonSchema({"type": "string"}),
            Kind("three octal digits", '"027"'),
        ]
        | None
    ) = Field(default=None, json_schema_extra={"default_text": "the agent's own"})
    """Permissions that new files of the ranks do not get."""
    limits: dict[Annotated[str, BeforeValidator(scalars.limit_name), Kind("a limit", "nofile")], Limit] = (
        Field(default_factory=dict)
    )
    """Resource limits as of setrlimit: nofile, memlock, core, stack and the others."""
    stop: StopSection = StopSection()
    """How ranks are asked to end."""
    warn: WarnSection | None = None
    """A signal ahead of a stop that is known beforehand; left out: none."""
    warm: Annotated[
        Literal["auto", "never"],
        BeforeValidator(scalars.one_of("auto", "never")),
        Kind("a word", "never"),
    ] = "auto"
    """auto: ranks are forked from a process that has torch loaded, where that can be. never: from nothing."""
    preload: tuple[Module, ...] = ()
    """Modules that this process imports ahead, beside those that keepstep knows by itself."""
    hook: Truth = True
    """true: steps, phases and evidence of PyTorch scripts are seen from inside; false: they are not."""
    logs: LogsSection = LogsSection()
    """What a node keeps of each rank's output."""

    @classmethod
    def hint(cls) -> str:
        return "Write   command: python train.py   beneath it, or   llama: {}   for the built-in trainer."
