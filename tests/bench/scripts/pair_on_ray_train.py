"""pair.py under Ray Train v2: pair_on_ray_train.py ADDRESS RESOURCE KEY=VALUE STEPS FOLDER

Two workers with one slot of the resource each, on nodes with the label; Ray Train makes the process group and
restarts both workers by its own failure policy.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

SCRIPT = Path(__file__).with_name("pair.py")


def loop(config: dict[str, Any]) -> None:
    sys.argv = [str(SCRIPT), str(config["steps"]), config["folder"]]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def main() -> None:
    address, resource, label, steps, folder = sys.argv[1:6]
    key, _, value = label.partition("=")
    ray.init(address=address, log_to_driver=False)
    trainer = ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={"steps": int(steps), "folder": folder},
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": 0, resource: 1}, label_selector={key: value}
        ),
        run_config=ray.train.RunConfig(
            storage_path=f"{folder}/storage", failure_config=ray.train.FailureConfig(max_failures=100)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    main()
