"""Measure whether a model of all ten digits is a better start for the digits 5 to 9 than random weights.

    python benchmarks/init_from.py --dataset_name FOLDER --json init_from.json      # a local copy of MNIST
    python benchmarks/init_from.py --preset digits                                  # scikit-learn's digits

A model is trained on all digits by a preset. Then, for each seed, two runs of equal length are
trained on the digits 5 to 9: one starts from this model (--init_from), the other from random weights. The validation
loss of the moving average of both is measured on the same held-out images, noise and timesteps.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from interleaved import report

from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.training.loop import FinishedRun, train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="mnist-cpu", help="recipe of all runs; default: mnist-cpu")
    add("--dataset_name", help="Hub id or folder of digits in ten classes; default: that of the preset")
    add("--first_steps", type=int, default=600, help="steps on all digits; default: 600")
    add("--steps", type=int, nargs="+", default=[50, 200], help="steps on the digits 5 to 9; default: 50 200")
    add("--seeds", type=int, default=3, help="number of seeds; default: 3")
    add("--json", help="file to write the numbers to; default: only print them")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, because the table has standard deviations")
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        flags = {"preset": arguments.preset}
        if arguments.dataset_name:
            flags["dataset_name"] = arguments.dataset_name
        base = train_one(Path(place, "all"), seed=100, max_train_steps=arguments.first_steps, **flags)
        flags["class_names"] = ["5", "6", "7", "8", "9"]
        for steps in arguments.steps:
            for name, start in {"--init_from": {"init_from": str(base.folder)}, "random weights": {}}.items():
                runs = [
                    train_one(
                        Path(place, f"{steps}-{len(start)}-{seed}"), seed=seed, max_train_steps=steps, **flags | start
                    )
                    for seed in range(arguments.seeds)
                ]
                losses = [run.losses["validation_loss_ema"] for run in runs]
                rows[f"{name}, {steps} steps"] = {
                    "mean": statistics.mean(losses),
                    "deviation": statistics.stdev(losses),
                }
                print(name, steps, losses, flush=True)
    report({"validation loss on the digits 5 to 9": rows}, arguments.json)


def train_one(folder: Path, **flags) -> FinishedRun:
    """Train a run with as few pictures as possible."""
    few = {"logger": "none", "eval_batch_size": 1, "ddpm_num_inference_steps": 2}
    return train(TrainingConfig.from_preset(output_dir=str(folder), **few, **flags))


if __name__ == "__main__":
    main()
