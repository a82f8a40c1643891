"""Hugging Face's Trainer in a bad neighbourhood: long evaluations, storage and data that stall now and then.

stalling_hf.py STEPS OUT
"""

import os
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

steps, out = int(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Every so many samples the storage behind it takes its time."""

    def __init__(self, length: int, stall_every: int) -> None:
        self.length, self.stall_every, self.given = length, stall_every, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.given += 1
        if self.given % self.stall_every == 0:
            time.sleep(4.0 + self.given % 5)
        words = (torch.arange(16) * (index % 5 + 1)) % 64
        return {"input_ids": words, "labels": words}


class Slow(TrainerCallback):  # type: ignore[misc]
    """Its checkpoint folder is on a storage that others write to."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            time.sleep(3.0 + 4.0 * (state.global_step % 400 == 0))


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
torch.manual_seed(0)
arguments = TrainingArguments(
    output_dir=out, max_steps=steps, per_device_train_batch_size=2, per_device_eval_batch_size=2,
    save_steps=100, save_total_limit=1, eval_strategy="steps", eval_steps=150, logging_steps=10,
    report_to=[], use_cpu=True, dataloader_num_workers=0, seed=1,
)  # fmt: skip
trainer = Trainer(
    model=LlamaForCausalLM(config), args=arguments, train_dataset=Numbers(100_000, 190 + 70 * rank),
    eval_dataset=Numbers(2500, 100_000), callbacks=[Slow()],
)  # fmt: skip
trainer.train()
