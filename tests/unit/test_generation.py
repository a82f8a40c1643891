"""Generation: the same tokens with the cache and without it, alone and in a batch, and as transformers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.core.layout import Layout
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.generation import Decoder, Sampling, answers, generate
from keepstep.llama.generation.loop import Token
from keepstep.llama.generation.sampling import Sampler
from keepstep.llama.microbatch import Rotation, Sequences, micro_batches, targets_of
from keepstep.llama.model import Means, Stage
from keepstep.llama.tokenizer import ByteTokenizer
from keepstep.llama.weights import init_from
from keepstep.llama.weights.sources import open_source

CPU = torch.device("cpu")
GREEDY = Sampling()


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A model whose logits are far apart, so that no rounding decides; its answers still vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=260, max_position_embeddings=96, tie_word_embeddings=False,
        initializer_range=0.35, rope_parameters={
            "rope_type": "llama3", "rope_theta": 64.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 96,
        },  # of the two waves one is kept, one is interpolated
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return Decoder(open_source(folder), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    chance = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (n,), generator=chance) for n in (7, 1, 30, 12, 7)]


def said(stream: Iterator[Token], rows: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for one in stream:
        tokens[one.prompt].append(one.token)
    return tokens


def test_greedy_tokens_equal_transformers(theirs: Any, model: Decoder, prompts: list[Tensor]) -> None:
    ours = said(generate(model, prompts, most=40, sampling=GREEDY), len(prompts))
    for prompt, tokens in zip(prompts, ours, strict=True):
        row = prompt.unsqueeze(0)
        expected = theirs.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert len({token for tokens in ours for token in tokens}) > 10


def test_each_step_has_the_logits_of_the_whole_text_read_anew(
    theirs: Any, folder: Path, model: Decoder, prompts: list[Tensor]
) -> None:
    """The cache against no cache, against transformers, and against the model that is trained."""
    shape = model.shape
    state = FlatState(
        FlatIndex.of(shape, Layout(), Layout().coordinates(0)), 0, device=CPU, dtype=torch.float32
    )
    init_from(folder, state, shape)
    trained = Stage(shape, state, Means())
    rotation = Rotation(shape, CPU)
    cache, texts = model.cache(len(prompts)), list(prompts)
    logits = model.read(texts, cache)
    for _ in range(20):
        again = model.read(texts, model.cache(len(texts)))
        torch.testing.assert_close(logits, again, atol=2e-4, rtol=1e-5)
        assert torch.equal(logits.argmax(1), again.argmax(1))
        tokens = logits.argmax(1)
        texts = [torch.cat((text, token.view(1))) for text, token in zip(texts, tokens, strict=True)]
        logits = model.step(tokens, cache)
    for text, last in zip(texts, logits, strict=True):
        torch.testing.assert_close(last, theirs(text[None]).logits[0, -1], atol=5e-4, rtol=1e-4)
        zeros = torch.zeros(1, len(text), dtype=torch.int32)
        sequences = Sequences(torch.cat((text, text[:1]))[None], zeros, torch.arange(len(text))[None])
        (batch,) = micro_batches(
            sequences, targets_of(sequences), size=1, scale=1.0, rotation=rotation, dtype=torch.float32
        )
        logits_alone = trained(batch.tokens, batch=replace(batch, targets=None))
        torch.testing.assert_close(last, logits_alone[-1], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.8, seed=5)], ids=["greedy", "drawn"]
)
def test_a_prompt_is_answered_alike_alone_and_among_others(
    model: Decoder, prompts: list[Tensor], sampling: Sampling
) -> None:
    """Also while others end at stop tokens and leave the batch."""
    together = list(generate(model, prompts, most=40, sampling=sampling))
    stops = {together[6 * len(prompts)].token, together[12 * len(prompts) + 1].token}
    left = list(generate(model, prompts, most=40, sampling=sampling, stops=stops))
    for number, prompt in enumerate(prompts):
        alone = list(generate(model, [prompt], most=40, sampling=sampling, stops=stops, first=number))
        assert alone == [one for one in left if one.prompt == number]
        whole = [one.token for one in together if one.prompt == number]
        assert [one.token for one in alone] == whole[: len(alone)]
        assert alone[-1].ended == ("stop" if alone[-1].token in stops else "length")
    lengths = Counter(one.prompt for one in left)
    assert len(set(lengths.values())) > 1


def test_the_seed_decides(model: Decoder, prompts: list[Tensor]) -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return said(generate(model, prompts, most=20, sampling=sampling), len(prompts))

    assert drawn(1) == drawn(1) != drawn(2)
    twice = Sampling(temperature=1.5)
    first, second = said(generate(model, [prompts[0], prompts[0]], most=20, sampling=twice), 2)
    assert first != second


def test_no_answer_goes_past_the_models_positions(model: Decoder) -> None:
    tokens = list(generate(model, [torch.arange(90), torch.arange(3)], most=50, sampling=GREEDY))
    first, second = ([one for one in tokens if one.prompt == row] for row in (0, 1))
    assert (len(first), first[-1].ended) == (6, "context")
    assert (len(second), second[-1].ended) == (50, "length")
    for prompt, why in ((torch.arange(97), "has 97 tokens"), (torch.arange(0), "has 0 tokens")):
        with pytest.raises(InputError, match=f"prompt 2 {why}"):
            list(generate(model, [torch.arange(3), prompt], most=1, sampling=GREEDY))


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.3, 1e-9])
def test_draws_follow_the_distribution_cut_at_top_p(top_p: float) -> None:
    """Against the rule by hand: sorted, the fewest whose sum reaches top_p, each as likely as before."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.9, float("-inf"), 0.0]])
    temperature = 0.8
    odds = (logits[0].double() / temperature).softmax(0)
    kept: list[int] = []
    for token in odds.argsort(descending=True).tolist():
        kept.append(token)
        if odds[kept].sum() >= top_p:
            break
    kept = [token for token in kept if odds[token] > 0]
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=9), range(4000))
    counts = Counter(sampler.draw(logits.expand(4000, -1)).tolist())
    assert set(counts) == set(kept)
    for token in kept:
        share = float(odds[token] / odds[kept].sum())
        assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


def test_what_is_no_sampling_is_refused() -> None:
    refused: list[dict[str, Any]] = [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}
    ]  # fmt: skip
    for bad in refused:
        with pytest.raises(InputError, match="is no"):
            Sampling(**bad)


def test_text_comes_in_whole_characters_and_without_stop_tokens() -> None:
    word = "né€😀".encode()
    stream = [Token(0, byte, None) for byte in word] + [Token(0, 257, "stop")]
    stream += [Token(1, byte, None) for byte in word[:-2]] + [Token(1, word[-2], "length")]
    seen = list(answers(iter(stream), ByteTokenizer()))
    fresh = [answer.fresh for answer in seen if answer.prompt == 1]
    whole: dict[int, str] = {}
    for answer in answers(iter(stream), ByteTokenizer()):
        whole[answer.prompt] = whole.get(answer.prompt, "") + answer.fresh
        assert answer.text == whole[answer.prompt]
    assert whole == {0: "né€😀", 1: "né€\N{REPLACEMENT CHARACTER}"}
    assert len(fresh) == len(word) - 1


def test_half_precision_runs(folder: Path, prompts: list[Tensor]) -> None:
    half = Decoder(open_source(folder), dtype=torch.bfloat16, device=CPU)
    tokens = said(generate(half, prompts, most=8, sampling=GREEDY), len(prompts))
    assert all(len(row) == 8 for row in tokens)
    assert half.embedding.dtype == torch.bfloat16 and half.cache(1).keys.dtype == torch.bfloat16
