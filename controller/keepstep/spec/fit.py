"""Whether a resolved spec holds together: the layout multiplies out, the model can be cut that way, the batch
divides. The same checks stand before a document becomes a job and before a stored job is believed.
"""

import math
from collections.abc import Iterator

from keepstep.core.job import (
    Batch,
    BatchSizes,
    CommandRun,
    JobSpec,
    LlamaRun,
    ModelShape,
    Pipeline,
    Resources,
)
from keepstep.core.layout import Layout
from keepstep.spec.problems import Path, Problem, counted

_MODEL: Path = ("run", "llama", "model")
_BATCH: Path = ("run", "llama", "batch")
_PIPELINE: Path = ("run", "llama", "pipeline")
_ONE_CHUNK = Pipeline()
_FLOAT8_UNIT = 16  # elements: rows and columns of a product


def misfits(spec: JobSpec) -> Iterator[Problem]:
    """Everything that makes the job impossible."""
    layout, resources = spec.parallelism, spec.resources
    model: ModelShape | None = None
    batch: Batch | None = None
    pipeline = _ONE_CHUNK
    match spec.run:
        case LlamaRun(model=model, batch=batch, pipeline=pipeline):
            broken = [*model_problems(model), *_pipeline_problems(pipeline, layout)]
            yield from broken
            if broken:
                return
        case CommandRun():
            pass
    if layout.world_size != resources.ranks:
        yield _does_not_multiply_out(layout, resources, model, batch, pipeline)
    elif model is not None and batch is not None:
        for stage in batch.all:
            if found := list(_does_not_cut(model, stage, batch, layout, resources, pipeline)):
                yield from found
                break
    if spec.elastic.min_dp > layout.dp:
        what = f"min_dp {spec.elastic.min_dp} is more than the {layout.dp} replicas of the layout"
        yield Problem(path=("elastic", "min_dp"), what=what, next=f"At most {layout.dp}.")
    if model is not None and batch is not None:
        for number, stage in enumerate(batch.all):
            yield from _batch_problems(model, stage, layout, (*_BATCH, *_stage(number)))
        yield from _order_problems(batch, spec.run)
        yield from _float8_problems(spec.run, layout)


def doubts(spec: JobSpec) -> Iterator[str]:
    """What is possible, but perhaps not meant."""
    layout, slots = spec.parallelism, spec.resources.gpus_per_node
    if layout.tp > 1 and slots % layout.tp:
        yield f"parallelism: tp {layout.tp} does not divide {slots} GPUs per node: it works across nodes."
    if isinstance(spec.run, LlamaRun):
        count = min(stage.micro_batches(layout.dp) for stage in spec.run.batch.all)
        if count < layout.pp:
            yield (
                f"run.llama.batch: {counted(count, 'micro-batch', 'micro-batches')} a step for {layout.pp} "
                f"pipeline stages: {layout.pp - count} or more of them are idle at any time."
            )
        if spec.run.numerics.shard != "optimizer" and layout.dp * layout.cp == 1:
            yield "run.llama.numerics.shard: with dp 1 and cp 1 there is nobody to share anything with."
    if spec.elastic.min_dp < layout.dp and spec.replica_counts == (layout.dp,):
        fewer = range(spec.elastic.min_dp, layout.dp)
        these = (
            f"{fewer[0]} does not divide" if len(fewer) == 1 else f"none of {fewer[0]} to {fewer[-1]} divides"
        )
        yield f"elastic: {these} {layout.dp} replicas, so the job cannot shrink."
    if isinstance(spec.run, CommandRun) and spec.checkpoint.dir is None:
        yield "checkpoint.dir: not given, so the script restarts from wherever it finds its own state."


def model_problems(model: ModelShape) -> Iterator[Problem]:
    if model.dim % model.heads:
        what = f"dim {model.dim:,} is no multiple of {model.heads} heads"
        yield Problem(path=_MODEL, what=what, next=_divisors(model.dim, "heads", near=model.heads))
    elif model.head_dim % 2:
        what = f"dim {model.dim:,} / {model.heads} heads = {model.head_dim}, and rotation works on pairs"
        yield Problem(path=_MODEL, what=what, next="Make it even.")
    if model.heads % model.kv_heads:
        what = f"{model.kv_heads} KV heads do not divide {model.heads} heads"
        yield Problem(path=_MODEL, what=what, next=_divisors(model.heads, "kv_heads", near=model.kv_heads))


def _pipeline_problems(pipeline: Pipeline, layout: Layout) -> Iterator[Problem]:
    """What is wrong with it for every model."""
    if pipeline.schedule == "1f1b" and pipeline.chunks > 1:
        next_ = "Choose the schedule interleaved or gpipe."
        yield Problem(path=_PIPELINE, what=f"1f1b knows one chunk a rank, not {pipeline.chunks}", next=next_)
    elif pipeline.chunks > 1 and layout.pp == 1:
        what = f"{pipeline.chunks} chunks a rank, and pp 1: there is nobody to take turns with"
        yield Problem(path=_PIPELINE, what=what, next="Give parallelism.pp, or leave the pipeline out.")


def cuts(
    model: ModelShape, layout: Layout, pipeline: Pipeline = _ONE_CHUNK, batch: BatchSizes | None = None
) -> Iterator[str]:
    """Why the built-in trainer cannot cut the model and its sequences so; nothing if it can."""
    for noun, count in (
        ("heads", model.heads),
        ("KV heads", model.kv_heads),
        ("FFN columns", model.ffn_dim),
        ("vocabulary entries", model.vocabulary),
    ):
        if count % layout.tp:
            yield f"tp {layout.tp} does not divide {count:,} {noun}"
    stages, parts = layout.pp * pipeline.chunks, model.layers + 2
    if stages > parts:
        of = f" with {pipeline.chunks} chunks each" if pipeline.chunks > 1 else ""
        yield f"pp {layout.pp}{of} is more stages than {model.layers} layers, embedding and output"
    if pipeline.chunks > 1 and layout.pp == 1:
        yield f"pp 1 has no use for {pipeline.chunks} chunks"
    if batch is None:
        return
    if layout.cp > 1 and batch.seq % (2 * layout.cp):
        yield f"cp {layout.cp} cuts {batch.seq:,} tokens into {2 * layout.cp} chunks, which are not equal"
    elif (tokens := batch.seq * batch.micro_batch // layout.cp) % layout.tp:
        yield f"tp {layout.tp} does not divide the {tokens:,} tokens of a micro-batch on a rank"


def nearest_layouts(
    model: ModelShape | None,
    batch: Batch | None,
    ranks: int,
    like: Layout,
    pipeline: Pipeline = _ONE_CHUNK,
    *,
    count: int = 3,
) -> tuple[Layout, ...]:
    """Layouts of `ranks` ranks that fit the model and the batch, those most like `like` first.

    Sequences are cut only where they already were.
    """
    stages = (None,) if batch is None else batch.all
    fitting = [
        layout
        for layout in _factorisations(ranks)
        if (layout.cp == 1 or like.cp > 1)
        and (model is None or not any(reason for s in stages for reason in cuts(model, layout, pipeline, s)))
        and all(s is None or s.sequences % (layout.dp * s.micro_batch) == 0 for s in stages)
    ]
    fitting.sort(key=lambda layout: (_distance(layout, like), layout.cp, layout.pp, layout.tp))
    return tuple(fitting[:count])


def written(layout: Layout) -> str:
    """tp 2 pp 2 dp 2"""
    return str(layout).replace(" x ", " ")


def _does_not_multiply_out(
    layout: Layout, resources: Resources, model: ModelShape | None, batch: Batch | None, pipeline: Pipeline
) -> Problem:
    ranks = counted(layout.world_size, "rank")
    product = f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp} x cp {layout.cp} = {ranks}"
    nodes_given, gpus = counted(resources.nodes, "node"), counted(resources.gpus_per_node, "GPU")
    given = f"{nodes_given} x {gpus} = {resources.ranks:,}"
    nodes, rest = divmod(layout.world_size, resources.gpus_per_node)
    other = f" Or take {counted(nodes, 'node')}." if not rest else ""
    advice = _nearest(model, batch, resources.ranks, layout, pipeline) + other
    return Problem(path=("parallelism",), what=f"{product}, but resources give {given}.", next=advice.strip())


def _does_not_cut(
    model: ModelShape,
    stage: BatchSizes,
    batch: Batch,
    layout: Layout,
    resources: Resources,
    pipeline: Pipeline,
) -> Iterator[Problem]:
    reasons = list(cuts(model, layout, pipeline, stage))
    if reasons:
        named = f"the {model.preset} model" if model.preset else "the model"
        what = f"{written(layout)} does not fit {named}: {'; '.join(reasons)}."
        next_ = _nearest(model, batch, resources.ranks, layout, pipeline)
        yield Problem(path=("parallelism",), what=what, next=next_)


def _nearest(
    model: ModelShape | None, batch: Batch | None, ranks: int, like: Layout, pipeline: Pipeline
) -> str:
    layouts = nearest_layouts(model, batch, ranks, like, pipeline)
    which = "Nearest layouts that fit this model" if model else "Nearest layouts"
    if not layouts:
        layouts = nearest_layouts(model, None, ranks, like, pipeline)
        which = f"{which}, with another batch"
    if not layouts:
        return f"No layout of {counted(ranks, 'rank')} fits this model."
    return f"{which}: {', '.join(written(each) for each in layouts)}."


def _stage(number: int) -> Path:
    """Where a stage stands beneath the batch; 0: the first, which is the batch itself."""
    return ("stages", number - 1) if number else ()


def _order_problems(batch: Batch, run: LlamaRun | CommandRun) -> Iterator[Problem]:
    assert isinstance(run, LlamaRun)
    before = 0
    for number, stage in enumerate(batch.stages, start=1):
        at = (*_BATCH, *_stage(number))
        if stage.after_steps <= before:
            what = f"begins after {counted(stage.after_steps, 'step')}, no later than the stage before it"
            yield Problem(path=at, what=what, next="Name stages in their order; each needs a step at least.")
        elif stage.after_steps >= run.steps:
            what = f"begins after {counted(stage.after_steps, 'step')}, and the job has {run.steps:,}"
            yield Problem(path=at, what=what, next="Raise steps, or leave the stage out.")
        before = stage.after_steps


def _float8_problems(run: LlamaRun | CommandRun, layout: Layout) -> Iterator[Problem]:
    assert isinstance(run, LlamaRun)
    if not run.numerics.float8:
        return
    at: Path = ("run", "llama", "numerics", "float8")
    if run.numerics.precision == "fp32":
        yield Problem(path=at, what="goes with bf16, not with fp32", next="Leave one of them out.")
    model = run.model
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    for noun, size in (
        ("dim", model.dim),
        ("dim / tp", model.dim // layout.tp),
        ("FFN dim / tp", model.ffn_dim // layout.tp),
        ("width of queries, keys and values / tp", heads // layout.tp),
    ):  # fmt: skip
        if size % _FLOAT8_UNIT:
            next_ = "Change the model or tp, or leave it out."
            yield Problem(
                path=at, what=f"needs a multiple of {_FLOAT8_UNIT}, and {noun} is {size:,}", next=next_
            )


def _batch_problems(model: ModelShape, batch: BatchSizes, layout: Layout, path: Path) -> Iterator[Problem]:
    if batch.seq > model.max_seq:
        what = f"{batch.seq:,} tokens are more than the model's max_seq of {model.max_seq:,}"
        next_ = "Shorten it, or give the model a larger max_seq."
        yield Problem(path=(*path, "seq"), what=what, next=next_)
    at = (*path, "global_tokens")
    unit = batch.seq * layout.dp * batch.micro_batch
    below, above = batch.global_tokens // unit * unit, -(-batch.global_tokens // unit) * unit
    near = f"{below:,} or {above:,}" if below else f"{above:,}"
    next_ = f"Nearest that fit: {near} tokens." if below != above else ""
    if batch.global_tokens % batch.seq:
        what = f"{batch.global_tokens:,} tokens are no whole number of sequences of {batch.seq:,}"
        yield Problem(path=at, what=what, next=next_)
    elif batch.sequences % layout.dp:
        what = (
            f"{batch.sequences:,} sequences of {batch.seq:,} tokens do not divide over {layout.dp:,} replicas"
        )
        yield Problem(path=at, what=what, next=next_)
    elif batch.sequences // layout.dp % batch.micro_batch:
        each = batch.sequences // layout.dp
        what = (
            f"{each:,} sequences of each replica are no whole number of micro-batches of {batch.micro_batch}"
        )
        yield Problem(path=at, what=what, next=next_)


def _factorisations(ranks: int) -> Iterator[Layout]:
    for tp in _all_divisors(ranks):
        for pp in _all_divisors(ranks // tp):
            for cp in _all_divisors(ranks // tp // pp):
                yield Layout(tp=tp, pp=pp, cp=cp, dp=ranks // tp // pp // cp)


def _all_divisors(number: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})


def _distance(one: Layout, other: Layout) -> float:
    """How many doublings lie between two layouts."""
    pairs = ((one.tp, other.tp), (one.pp, other.pp), (one.cp, other.cp), (one.dp, other.dp))
    return round(sum(abs(math.log2(a / b)) for a, b in pairs), 6)


def _divisors(number: int, field: str, *, near: int) -> str:
    nearest = sorted(_all_divisors(number), key=lambda k: (abs(math.log2(k / near)), k))[:3]
    return f"Nearest {field} that divide {number:,}: {', '.join(map(str, sorted(nearest)))}."
