"""torchtitan's trainer at 2 x 2 x 2 on CPUs, as tests/bench/trainer.py measures it: run by .venv/torchtitan.

Its own model, FSDP, tensor and pipeline parallelism, optimizer and training step. Changed for gloo on CPUs:
what it asks of the device, the attention kernel (flex has no backward pass on CPUs; one document a sequence
needs no mask), and sums instead of PREMUL_SUM where gradients are added.
"""
# ruff: noqa: E402 - torchtitan looks for its device when it is imported

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torchtitan.tools.utils as device
from torch.distributed.fsdp import FSDPModule


class Cpu:
    """torch.cpu, and what torchtitan asks of torch.cuda beside that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def nothing(self, *_: object) -> None: ...

    set_device = reset_peak_memory_stats = empty_cache = nothing

    def get_device_name(self, *_: object) -> str:
        return "cpu"

    def get_device_properties(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1 << 34)

    def memory_stats(self, *_: object) -> dict[str, int]:
        return {}


# Before anything else of torchtitan takes them over.
device.device_type, device.device_module = "cpu", Cpu()
device.get_local_device = lambda *_: torch.device("cpu")

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models import llama3
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from in_turn import train_in_turn
from rank_gang import run_gang

SEQ, SEQUENCES = 256, 4
DIM, HEADS, KV_HEADS, FFN, LAYERS, VOCABULARY = 256, 8, 4, 768, 4, 260


def batches(
    *, dp_rank: int, local_batch_size: int, **_: object
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    chance = np.random.default_rng(dp_rank)
    while True:
        tokens = torch.from_numpy(chance.integers(0, VOCABULARY, (local_batch_size, SEQ + 1)))
        yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def model() -> Any:
    llama3.get_attention_config = lambda *_: ScaledDotProductAttention.Config()
    return llama3.Llama3Model.Config(
        dim=DIM, vocab_size=VOCABULARY,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=llama3._EMBEDDING_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=DIM, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=DIM, out_features=VOCABULARY, param_init=llama3._output_linear_init(DIM)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=LAYERS, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=FFN, attn_backend="",
            rope=llama3.ComplexRoPE.Config(
                dim=DIM // HEADS, max_seq_len=2048, theta=500_000, scaling="none"
            ),
        ),
    )  # fmt: skip


def config() -> Any:
    config = llama3_debugmodel()
    config.model_spec.model = model()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    config.training = TrainingConfig(
        local_batch_size=SEQUENCES // 2, seq_len=SEQ, steps=10_000, disable_cuda_graphs=True,
        mixed_precision_param="float32",
    )  # fmt: skip
    config.parallelism = ParallelismConfig(
        data_parallel_shard_degree=2, tensor_parallel_degree=2, pipeline_parallel_degree=2,
        pipeline_parallel_schedule="1F1B", pipeline_parallel_microbatch_size=1,
    )  # fmt: skip
    config.activation_checkpoint = None
    config.checkpoint = CheckpointManager.Config(enable=False)
    config.validator.enable = False
    config.metrics.log_freq = 10  # as it is by default
    config.dataloader = BaseDataLoader.Config()
    config.dataloader.__class__.build = lambda _, **given: batches(**given)
    config.tokenizer.__class__.build = lambda *_, **__: None
    return config


def rank() -> None:
    divide = FSDPModule.set_gradient_divide_factor

    def by_sums(self: FSDPModule, factor: float) -> None:
        self.set_force_sum_reduction_for_comms(True)
        divide(self, factor)

    FSDPModule.set_gradient_divide_factor = by_sums  # type: ignore[method-assign]
    given = config()
    given.__class__.to_dict = lambda _: {}  # for logging services only
    trainer = Trainer(given)
    data = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(data)

    train_in_turn(step)


if __name__ == "__main__":
    run_gang(8, rank, deadline_s=600)
