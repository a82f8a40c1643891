"""One process: the model is Hugging Face's Llama to rounding, and packing documents changes nothing."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from keepstep.core.footprint import activation_bytes
from keepstep.core.layout import Coordinates, Layout
from keepstep.llama.attention import attend
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.initial import initialise
from keepstep.llama.microbatch import (
    MicroBatch,
    Rotation,
    Sequences,
    Share,
    Window,
    cut_window,
    frequencies,
    micro_batches,
    spans_of,
    targets_of,
)
from keepstep.llama.model import Means, Stage
from keepstep.llama.numerics import RECOMPUTATIONS
from keepstep.llama.shape import ModelShape, RopeScaling
from keepstep.llama.weights import config_of, shape_of
from live_tensors import LiveTensors

SHAPE = ModelShape(layers=2, dim=64, ffn_dim=96, heads=4, kv_heads=2, vocabulary=68, max_seq=64)
CPU = torch.device("cpu")
PLAIN = Means()


def whole(sequences: int, seq: int) -> Sequences:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(SHAPE.vocabulary, (sequences, seq + 1), generator=generator)
    positions = torch.arange(seq).expand(sequences, seq)
    return Sequences(tokens, torch.zeros(sequences, seq, dtype=torch.int32), positions)


def model(means: Means = PLAIN) -> tuple[FlatState, Stage]:
    index = FlatIndex.of(SHAPE, Layout(), Coordinates(dp=0, pp=0, cp=0, tp=0))
    state = FlatState(index, 0, device=CPU, dtype=torch.float32)
    initialise(state, SHAPE, seed=3)
    return state, Stage(SHAPE, state, means)


def run(stage: Stage, sequences: Sequences, scale: float) -> Tensor:
    """Forward and backward of the whole; the loss, gradients added into the state."""
    total = torch.zeros(())
    for batch in micro_batches(
        sequences,
        targets_of(sequences),
        size=2,
        scale=scale,
        rotation=Rotation(SHAPE, CPU),
        dtype=torch.float32,
    ):
        loss = stage(batch.tokens, batch=batch)
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


@pytest.fixture(scope="module")
def hugging_face():  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SHAPE.dim, intermediate_size=SHAPE.ffn_dim, num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads, vocab_size=SHAPE.vocabulary,
        max_position_embeddings=SHAPE.max_seq, rms_norm_eps=SHAPE.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )  # fmt: skip
    return LlamaForCausalLM(config)


NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
    "w3": "mlp.up_proj", "w2": "mlp.down_proj", "embedding": "model.embed_tokens", "norm": "model.norm",
    "output": "lm_head",
}  # fmt: skip


def theirs(name: str) -> str:
    *_, part, _weight = name.split(".")
    layer = f"model.layers.{name.split('.')[1]}." if name.startswith("layers.") else ""
    return f"{layer}{NAMES[part]}.weight"


def test_logits_loss_and_gradients_are_those_of_hugging_face(hugging_face) -> None:  # type: ignore[no-untyped-def]
    state, stage = model()
    torch.nn.init.normal_(state.weights, std=0.05, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in hugging_face.named_parameters():
            ours = next(p.name for p in state.index.parameters if theirs(p.name) == name)
            parameter.copy_(state.weight(ours))
    data = whole(2, 32)
    answer = hugging_face(input_ids=data.tokens[:, :-1], labels=None)
    (batch,) = micro_batches(
        data, targets_of(data), size=2, scale=1 / 64, rotation=Rotation(SHAPE, CPU), dtype=torch.float32
    )
    logits = stage(batch.tokens, batch=replace(batch, targets=None))
    torch.testing.assert_close(logits.view_as(answer.logits), answer.logits, atol=1e-5, rtol=1e-5)

    loss = torch.nn.functional.cross_entropy(answer.logits.flatten(0, 1), data.tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    ours_loss = run(stage, data, 1 / 64)
    assert abs(ours_loss.item() - loss.item()) < 1e-5
    gradients = dict(hugging_face.named_parameters())
    for parameter in state.index.parameters:
        expected = gradients[theirs(parameter.name)].grad
        torch.testing.assert_close(state.grad(parameter.name), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("theta", "scaling", "kept"),
    [
        (
            5e5,
            RopeScaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
            ),
            29,
        ),
        (
            1e4,
            RopeScaling(
                factor=32.0, low_freq_factor=2.0, high_freq_factor=3.0, original_max_position_embeddings=64
            ),
            9,
        ),
    ],
)
def test_scaled_rotary_frequencies_are_those_of_transformers(
    theta: float, scaling: RopeScaling, kept: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = replace(SHAPE, dim=128, heads=1, kv_heads=1, rope_theta=theta, rope_scaling=scaling)
    config = LlamaConfig(**config_of(shape, dtype="float32"))
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config)
    ours, plain = frequencies(shape), frequencies(replace(shape, rope_scaling=None))
    torch.testing.assert_close(ours, expected, atol=0.0, rtol=2e-6)
    assert factor == 1.0 and int((ours == plain).sum()) == kept
    assert 0 < int(((ours < plain) & (ours > plain / scaling.factor * 1.01)).sum()) < 10, "interpolated"
    assert shape_of(config.to_dict(), "transformers") == shape
    assert ModelShape.of(json.loads(json.dumps(asdict(shape)))) == shape


def test_packed_documents_give_the_loss_and_gradients_of_each_alone() -> None:
    lengths = (9, 16, 7)
    packed = Sequences(
        whole(1, sum(lengths)).tokens,
        torch.repeat_interleave(torch.tensor(lengths)).view(1, -1).int(),
        torch.cat([torch.arange(n) for n in lengths]).view(1, -1),
    )
    # Each document alone predicts its own tokens; the last one's last target is the token past the sequence.
    valid = int((targets_of(packed) >= 0).sum())
    assert valid == sum(lengths) - (len(lengths) - 1)
    state, stage = model()
    loss = run(stage, packed, 1 / valid)
    gradients = state.grads.clone()

    state.grads.zero_()
    total, start = 0.0, 0
    for k, length in enumerate(lengths):
        keep = length if k == len(lengths) - 1 else length - 1  # its last token predicts nothing
        alone = replace(whole(1, keep), tokens=packed.tokens[:, start : start + keep + 1])
        total += float(run(stage, alone, 1 / valid))
        start += length
    assert abs(total - float(loss)) < 1e-6
    torch.testing.assert_close(gradients, state.grads, atol=1e-6, rtol=1e-5)


def test_a_document_does_not_see_its_neighbour() -> None:
    packed = Sequences(
        whole(1, 32).tokens,
        torch.arange(2).repeat_interleave(16).view(1, -1),
        torch.arange(16).repeat(2).view(1, -1),
    )
    _, stage = model()

    def logits() -> Tensor:
        (batch,) = micro_batches(
            packed, targets_of(packed), size=1, scale=1, rotation=Rotation(SHAPE, CPU), dtype=torch.float32
        )
        out: Tensor = stage(batch.tokens, batch=replace(batch, targets=None)).detach()
        return out

    before = logits()
    packed.tokens[0, 3] = (packed.tokens[0, 3] + 1) % SHAPE.vocabulary
    after = logits()
    assert torch.equal(before[16:], after[16:])
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:16], after[3:16])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_context_parallel_ranks_share_out_the_tokens_and_the_work(size: int) -> None:
    shares = [Share(size, rank) for rank in range(size)]
    every = torch.cat([share.tokens(2, 48) for share in shares])
    assert torch.equal(every.sort().values, torch.arange(96))
    assert torch.equal(every[shares[0].order(2, 48)], torch.arange(96))
    work = {sum(position + 1 for chunk in share.chunks(48) for position in chunk) for share in shares}
    assert len(work) == 1, "keys that a rank's queries see, in a document as long as the sequence"


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("cuts", [(), (1,), (5, 6, 23), (24,), (12, 36), (47,)])
def test_attention_of_each_part_of_the_context_is_that_of_the_whole(size: int, cuts: tuple[int, ...]) -> None:
    """Documents that end inside, at and across chunks; forward and backward."""
    documents = torch.zeros(2, 48, dtype=torch.int32)
    for cut in cuts:
        documents[0, cut:] += 1  # the other sequence is one document
    positions = torch.arange(48).expand(2, 48)
    data = Sequences(torch.zeros(2, 49, dtype=torch.int64), documents, positions)
    rotation, parts = Rotation(SHAPE, CPU), []
    for share in [Share(), *(Share(size, rank) for rank in range(size))]:
        parts += micro_batches(
            data, targets_of(data), size=2, scale=1.0, rotation=rotation, dtype=torch.float32, share=share
        )
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(96, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    expected = attend(q, k, v, parts[0])
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    rows = [Share(size, rank).tokens(2, 48) for rank in range(size)]
    found = torch.zeros_like(expected)
    for mine, batch in zip(rows, parts[1:], strict=True):
        found = found.index_copy(0, mine, attend(q[mine], k, v, batch))
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad((found * weight).sum(), (q, k, v))
    torch.testing.assert_close(got, wanted)


def test_a_window_is_cut_into_windows_of_the_same_queries_and_keys() -> None:
    def pairs(windows: list[Window]) -> list[tuple[int, int]]:
        """Of each query, the keys that it sees."""
        return [(begin, end - count + k) for count, begin, end in windows for k in range(1, count + 1)]

    for window in ((7, 3, 20), (5, 0, 9), (1, 0, 40)):
        parts = cut_window(window, 50)
        assert pairs(parts) == pairs([window])
        assert all(count * (end - begin) <= 50 for count, begin, end in parts)
    assert cut_window((40, 0, 40), 50) == [(40, 0, 40)], "no mask"


def test_blocks_of_queries_attend_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, h, 16, generator=generator) for n, h in ((24, 4), (96, 2), (96, 2)))
    batch = MicroBatch(
        tokens=q, targets=None, scale=1.0, cos=q, sin=q, spans=(60, 36), windows=((14, 0, 50), (10, 60, 80))
    )
    found = []
    for most in (2**24, 130):  # rows of two or three queries
        monkeypatch.setattr("keepstep.llama.attention.MASK", most)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(inputs[0], inputs[1], inputs[2], batch)
        found.append((out.detach(), *torch.autograd.grad((out * q).sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_no_mask_is_larger_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(n, 1, 2).requires_grad_() for n in (256, 2048, 2048))
    batch = MicroBatch(
        tokens=q, targets=None, scale=1.0, cos=q, sin=q, spans=(2048,), windows=((256, 0, 2048),)
    )
    most = []
    for bound in (2**24, 2**12):
        monkeypatch.setattr("keepstep.llama.attention.MASK", bound)
        with LiveTensors() as live:
            attend(q, k, v, batch).sum().backward()  # type: ignore[no-untyped-call]
        most.append(live.most)
    assert most[0] > 256 * 2048 > 4 * most[1]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_twice_gives_the_same_bits(recompute: str) -> None:
    (kept, first), (again, second) = model(), model(Means(recompute=recompute))
    losses = [run(stage, whole(2, 32), 1 / 64) for stage in (first, second)]
    assert torch.equal(*losses)
    assert torch.equal(kept.grads, again.grads)


def test_the_loss_of_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (one, first), (other, second) = model(), model()
    expected = run(first, whole(2, 32), 1 / 64)
    monkeypatch.setattr("keepstep.llama.model.LOGITS", 7 * SHAPE.vocabulary)  # 64 tokens: nine and a bit
    assert run(second, whole(2, 32), 1 / 64).item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(other.grads, one.grads, atol=1e-6, rtol=1e-5)


def held(shape: ModelShape, tokens: int, recompute: str) -> int:
    """Bytes that one layer's graph holds in bf16, from what autograd saves; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    storages: dict[int, int] = {}
    with FakeTensorMode():
        index = FlatIndex.of(replace(shape, layers=1), Layout(), Layout().coordinates(0))
        state = FlatState(index, 0, device=CPU, dtype=torch.bfloat16)
        stage = Stage(replace(shape, layers=1), state, Means(recompute=recompute))
        table = torch.empty(tokens, 1, shape.head_dim // 2, dtype=torch.bfloat16)
        batch = MicroBatch(
            tokens=torch.empty(0), targets=None, scale=1.0, cos=table, sin=table, spans=(tokens,)
        )
        ours = {table.untyped_storage()._cdata, state.weights.untyped_storage()._cdata}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage._cdata not in ours:
                storages[storage._cdata] = storage.nbytes()
                kept.append(storage)  # or its address would be given to another
            return saved

        kept: list[object] = []
        x = torch.empty(tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            stage.layers[0](x, batch)
    return sum(storages.values())


@pytest.mark.parametrize("recompute", RECOMPUTATIONS)
def test_a_layer_of_8b_holds_what_the_formula_says(recompute: str) -> None:
    """At 8,192 tokens: 1,144, 776 and 67 MB."""
    shape = ModelShape(
        layers=32, dim=4096, ffn_dim=14_336, heads=32, kv_heads=8, vocabulary=256, max_seq=8192
    )
    found = held(shape, 8192, recompute)
    assert found == pytest.approx(activation_bytes(shape, 8192, recompute), rel=0.01)


def test_spans_end_with_their_sequence() -> None:
    documents = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert spans_of(documents) == (2, 2, 4)
