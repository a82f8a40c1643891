"""Hugging Face's Trainer with its states in memory only: dropout, shuffling, a scheduler."""

import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from keepstep.session.huggingface import SnapshotCallback

steps, kill_at, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(16) * (index % 5 + 1)) % 64
        return {"input_ids": words, "labels": words}


class Killer(TrainerCallback):  # type: ignore[misc]
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == kill_at and began == 0 and args.process_index == 1:
            os.kill(os.getpid(), 9)


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    attention_dropout=0.1,
)  # fmt: skip
torch.manual_seed(0)
model = LlamaForCausalLM(config)
arguments = TrainingArguments(
    output_dir=out, max_steps=steps, per_device_train_batch_size=2, save_strategy="no", logging_steps=10,
    report_to=[], use_cpu=True, dataloader_num_workers=0, seed=1, learning_rate=0.01, warmup_steps=5,
)  # fmt: skip
snapshots = SnapshotCallback()
found = snapshots.checkpoint()
trainer = Trainer(model=model, args=arguments, train_dataset=Numbers(), callbacks=[snapshots, Killer()])
began = 0
if found is not None:
    import json
    from pathlib import Path

    began = json.loads((Path(found) / "trainer_state.json").read_text())["global_step"]
trainer.train(resume_from_checkpoint=found)
if trainer.is_world_process_zero():
    total = float(sum(p.detach().double().sum() for p in model.parameters()))
    print(f"began at {began}, done at {trainer.state.global_step}, weights {total:.12f}", flush=True)
    assert found is None or not Path(found).exists()
