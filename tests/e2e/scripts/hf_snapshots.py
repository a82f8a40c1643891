"""Hugging Face's Trainer with its states in memory only: dropout, shuffling, a scheduler, a loss scale.

As with fp16 on a GPU; the Trainer itself makes a scaler nowhere else.
"""

import json
import os
import sys
from pathlib import Path
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


def trained(resume_from: str | None, *callbacks: TrainerCallback) -> tuple[int, str]:
    """Steps, and what the weights add up to, with the loss scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=2, save_strategy="no", logging_steps=10,
        report_to=[], use_cpu=True, dataloader_num_workers=0, seed=1, learning_rate=0.01, warmup_steps=5,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Numbers(), callbacks=list(callbacks))
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=7)
    trainer.train(resume_from_checkpoint=resume_from)
    total = float(sum(p.detach().double().sum() for p in model.parameters()))
    return trainer.state.global_step, f"{total:.12f} x{scaler.get_scale():g}"


snapshots = SnapshotCallback()
found = snapshots.checkpoint()
began = json.loads((Path(found) / "trainer_state.json").read_text())["global_step"] if found else 0
done, total = trained(found, snapshots, Killer())
assert found is None or not Path(found).exists()
_, undisturbed = trained(None)
if os.environ["RANK"] == "0":
    print(f"began at {began}, done at {done}: {total}, undisturbed {undisturbed}", flush=True)
