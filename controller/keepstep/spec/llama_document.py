"""What stands deeper in the part of the document that is about the built-in trainer."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from keepstep.core import job
from keepstep.spec import scalars
from keepstep.spec.fields import Kind, Number, SomeText, Whole
from keepstep.spec.section import Section

_SCALING = job.RopeScaling(factor=1)


class RopeScalingSection(Section):
    """Llama 3.1's rotary positions: waves that are long within the original length are slowed down."""

    factor: Annotated[Number, Field(ge=1)]
    """How much slower; 8 in Llama 3.1, 32 in 3.2."""
    low_freq_factor: Annotated[Number, Field(gt=0)] = _SCALING.low_freq_factor
    """A wave that turns at most so often within the original length is slowed down wholly."""
    high_freq_factor: Annotated[Number, Field(gt=0)] = _SCALING.high_freq_factor
    """One that turns at least so often stays; between the two it is interpolated."""
    original_max_position_embeddings: Annotated[Whole, Field(ge=1, le=2**24)] = (
        _SCALING.original_max_position_embeddings
    )
    """The original length, in tokens."""


class BatchStageSection(Section):
    """A later stage of training, with another batch; what is left out stays as in the stage before."""

    after_tokens: Annotated[Whole, Field(ge=1, le=2**60)] | None = None
    """Begins with the first step by which so many tokens have been trained on. This or after_steps."""
    after_steps: Annotated[Whole, Field(ge=1, le=10**9)] | None = None
    """Begins after so many steps."""
    global_tokens: Annotated[Whole, Field(ge=1, le=2**40)] | None = None
    """Tokens of one optimizer step over all replicas."""
    seq: Annotated[Whole, Field(ge=1, le=2**24)] | None = None
    """Tokens of a sequence."""
    micro_batch: Annotated[Whole, Field(ge=1, le=2**20)] | None = None
    """Sequences that go through the model together."""


class WandbSection(Section):
    """A run of Weights & Biases, with the job's id as its own; its key comes by run.secrets.WANDB_API_KEY."""

    project: SomeText
    """The project."""
    entity: SomeText | None = Field(default=None, json_schema_extra={"default_text": "the key's own"})
    """The user or team."""
    name: SomeText | None = Field(default=None, json_schema_extra={"default_text": "the job's id"})
    """Of the run."""
    mode: (
        Annotated[
            Literal["online", "offline"],
            BeforeValidator(scalars.one_of("online", "offline")),
            Kind("a word", "offline"),
        ]
        | None
    ) = Field(default=None, json_schema_extra={"default_text": "WANDB_MODE, else online"})
    """offline: into files, for `wandb sync`; each attempt has files of its own."""
    dir: SomeText | None = Field(default=None, json_schema_extra={"default_text": "where the rank runs"})
    """A folder for its files, on every node."""

    @classmethod
    def short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"project": value}
        return super().short(value)


class MetricsSection(Section):
    """Tools that the rank that reports writes for, where keepstep[metrics] is installed; none fails steps."""

    tensorboard: SomeText | None = None
    """A folder, seen by every node; the job's events are in a folder of its id."""
    wandb: WandbSection | None = None
    """Weights & Biases: the name of a project, or its fields."""
