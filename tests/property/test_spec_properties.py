"""Safety of the spec: it answers with a job or with an InputError; what is kept comes back."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.core.errors import InputError
from keepstep.core.ids import Rank
from keepstep.core.job import Batch, CommandRun, JobSpec, LlamaRun, Resources
from keepstep.core.layout import Layout, local_ranks
from keepstep.spec import PRESETS, from_dict, load, nearest_layouts, paths, rank_map, to_dict
from keepstep.spec.fit import cuts
from keepstep.spec.ignore import Ignore

small = st.integers(1, 4)
layouts = st.builds(Layout, dp=small, pp=small, cp=small, tp=small)
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), words,
    st.sampled_from(["auto", "30s", "500 steps", "64MiB", "debug", "none", "no", "1:30", "0x10", "010"]),
)  # fmt: skip
keys = st.one_of(st.sampled_from(sorted({part for path in paths() for part in path.split(".")})), words)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A document that is right, with a few fields put wrong."""
    document: dict[str, Any] = {
        "run": draw(st.sampled_from([{"llama": {}}, {"command": ["python", "a.py"]}]))
    }
    document = json.loads(json.dumps(document))
    for path in draw(st.lists(st.sampled_from(paths()), max_size=4)):
        at: Any = document
        *way, last = path.split(".")
        for part in way:
            at = at.setdefault(part, {}) if isinstance(at, dict) else {}
        if isinstance(at, dict):
            at[last] = draw(values)
    return document


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    """A job that holds together, by way of its document."""
    layout = draw(layouts)
    llama = draw(st.booleans())
    if llama:
        layout = Layout(dp=layout.dp, pp=layout.pp, tp=draw(st.sampled_from([1, 2, 4])))
    slots = draw(st.sampled_from([k for k in range(1, layout.world_size + 1) if layout.world_size % k == 0]))
    run: dict[str, Any]
    if llama:
        micro = draw(small)
        tokens = 64 * layout.dp * micro * draw(small)
        batch = {"global_tokens": tokens, "seq": 64, "micro_batch": micro}
        model = draw(st.sampled_from(["debug", "small", "8b", {"preset": "debug", "layers": 7}]))
        run = {"llama": {"model": model, "batch": batch, "steps": draw(st.integers(1, 10**6))}}
    else:
        run = {"command": ["python", *draw(st.lists(words, min_size=1, max_size=3))], "ship": "none"}
    run["env"] = draw(st.dictionaries(st.from_regex(r"X_[A-Z_]{1,8}", fullmatch=True), words, max_size=3))
    document = {
        "resources": {"nodes": layout.world_size // slots, "gpus_per_node": slots, "spares": draw(small)},
        "parallelism": {"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
        "elastic": {"min_dp": draw(st.integers(1, layout.dp))},
        "run": run,
        "recovery": {"hang_after": draw(st.sampled_from(["auto", "90s", "1h30m"]))},
        "checkpoint": {"every": draw(st.sampled_from(["auto", "30m", "7 steps"]))},
    }
    return load(yaml.safe_dump(document), "property")


@given(specs())
def test_a_job_comes_back_from_its_record(spec: JobSpec) -> None:
    record = json.loads(json.dumps(to_dict(spec)))
    assert from_dict(record) == spec
    assert to_dict(from_dict(record)) == record


@given(specs())
def test_every_way_to_shrink_fits_the_nodes_there_are(spec: JobSpec) -> None:
    assert spec.replica_counts[0] == spec.parallelism.dp
    for dp in spec.replica_counts:
        world, nodes = dp * spec.parallelism.replica_size, spec.nodes_for(dp)
        assert spec.parallelism.dp % dp == 0
        assert world % nodes == 0
        assert world // nodes <= spec.resources.gpus_per_node
        assert nodes <= spec.resources.nodes
        assert len(rank_map(spec, dp=dp).splitlines()) == world + 2


@given(documents())
@settings(max_examples=300)
def test_a_document_is_a_job_or_an_input_error(document: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        spec = load(yaml.safe_dump(document, allow_unicode=True), "property")
        assert from_dict(to_dict(spec)) == spec


@given(st.dictionaries(keys, values, max_size=5))
def test_a_mapping_is_a_job_or_an_input_error(document: Mapping[str, Any]) -> None:
    with contextlib.suppress(InputError):
        load(yaml.safe_dump(dict(document)), "property")


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_is_a_job_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        load(text, "property")


@given(st.lists(st.text(max_size=20), max_size=3), st.sampled_from(paths()), values)
def test_any_override_is_a_job_or_an_input_error(texts: list[str], path: str, value: Any) -> None:
    for overrides in (texts, [f"{path}={value}"], [f"{path}={json.dumps(value)}"]):
        with contextlib.suppress(InputError):
            load("run: {llama: {}}", "property", overrides)


@given(specs(), st.data())
@settings(max_examples=200)
def test_a_record_with_anything_in_it_is_a_job_or_an_input_error(spec: JobSpec, data: st.DataObject) -> None:
    record = to_dict(spec)
    at: Any = record
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key in at if isinstance(at[key], dict)]
        if not inner:
            break
        at = at[data.draw(st.sampled_from(sorted(inner)))]
    at[data.draw(st.sampled_from([*sorted(at), "new"]))] = data.draw(values)
    with contextlib.suppress(InputError):
        again = from_dict(record)
        assert from_dict(to_dict(again)) == again


@given(layouts)
def test_ranks_and_coordinates_are_one_to_one(layout: Layout) -> None:
    seen = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(seen)) == layout.world_size
    for rank, at in enumerate(seen):
        assert layout.rank(dp=at.dp, pp=at.pp, cp=at.cp, tp=at.tp) == rank


@given(layouts, small)
def test_groups_and_nodes_share_out_all_ranks(layout: Layout, nodes: int) -> None:
    everyone = list(range(layout.world_size))
    for dimension in ("dp", "pp", "cp", "tp"):
        groups = {layout.group(dimension, Rank(rank)) for rank in everyone}
        assert sorted(rank for group in groups for rank in group) == everyone
    if layout.world_size % nodes == 0:
        assert [
            rank for node in range(nodes) for rank in local_ranks(layout.world_size, nodes, node)
        ] == everyone


@given(st.integers(1, 64), layouts, st.sampled_from(sorted(PRESETS)), small)
def test_layouts_that_are_proposed_fit(ranks: int, like: Layout, preset: str, sequences: int) -> None:
    model, batch = PRESETS[preset].shape, Batch(global_tokens=64 * sequences, seq=64)
    for layout in nearest_layouts(model, batch, ranks, like):
        assert layout.world_size == ranks
        assert not list(cuts(model, layout))
        assert batch.sequences % layout.dp == 0
    assert nearest_layouts(None, None, like.world_size, like)[0] == like, "what fits is nearest to itself"


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_line_of_an_ignore_file_can_be_asked(text: str, name: str) -> None:
    Ignore.of(text).leaves_out(name, folder=True)


def test_the_strategies_make_both_kinds() -> None:
    """So that the properties above are about something."""
    kinds: set[type] = set()

    @given(specs())
    def collect(spec: JobSpec) -> None:
        kinds.add(type(spec.run))
        assert isinstance(spec.resources, Resources)

    collect()
    assert kinds == {LlamaRun, CommandRun}
