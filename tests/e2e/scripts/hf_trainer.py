"""A fine-tuning script as its author wrote it, for torchrun: Hugging Face's Trainer, its own checkpoints."""

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", required=True)
options = parser.parse_args()


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(16) * (index % 5 + 1)) % 64
        return {"input_ids": words, "labels": words}


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
arguments = TrainingArguments(
    output_dir=options.out, max_steps=options.steps, per_device_train_batch_size=2, save_steps=10,
    save_total_limit=2, logging_steps=10, report_to=[], use_cpu=True, dataloader_num_workers=0, seed=1,
)  # fmt: skip
trainer = Trainer(model=model, args=arguments, train_dataset=Numbers())
last = get_last_checkpoint(options.out) if os.path.isdir(options.out) else None  # noqa: PTH112
trainer.train(resume_from_checkpoint=last)
if trainer.is_world_process_zero():
    total = float(sum(p.detach().double().sum() for p in model.parameters()))
    began = 0 if last is None else int(last.rsplit("-", 1)[1])
    print(f"began at {began}, done at {trainer.state.global_step}, weights {total:.10f}", flush=True)
