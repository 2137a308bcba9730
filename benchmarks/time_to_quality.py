"""Compare the quality of MNIST digits after equal CPU time: the preset `mnist-cpu` and the plain diffusers loop.

    OMP_NUM_THREADS=1 python benchmarks/time_to_quality.py --dataset_name ylecun/mnist --output_dir runs/time

Each trains for at most 600 CPU-seconds, counted over all cores and including data loading. The score is the digit FD
of 2,000 images by DDIM in 50 steps. The plain recipe has 32 px, 32/64/64 channels, two layers, attention at 16 and
8 px, linear betas, batch 64, learning rate 1e-3 and an EMA of power 3/4.
"""

import argparse
import time
from pathlib import Path

import datasets
import torch
from diffusers import UNet2DModel
from interleaved import report
from plain_diffusers import PlainLoop, loader
from tqdm import tqdm

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.evaluation.extractor import load_extractor
from ddpm_hf.evaluation.features import extract
from ddpm_hf.evaluation.statistics import frechet_distance_of_features
from ddpm_hf.models.pretrained import Pretrained
from ddpm_hf.pictures import image_sheet
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.training.batches_ahead import draw_batches
from ddpm_hf.training.loop import step
from ddpm_hf.training.periodic import run_due_tasks
from ddpm_hf.training.run import open_run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_name", default="ylecun/mnist", help="Hub id or folder of MNIST; default: ylecun/mnist"
    )
    parser.add_argument("--preset", default="mnist-cpu", help="preset of ddpm_hf; default: mnist-cpu")
    parser.add_argument("--budget", type=float, default=600, help="CPU-seconds of training for each; default: 600")
    parser.add_argument("--num_images", type=int, default=2000, help="number of images to score; default: 2000")
    parser.add_argument(
        "--output_dir", default="runs/time_to_quality", help="folder for results; default: runs/time_to_quality"
    )
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    real = datasets.load_dataset(arguments.dataset_name, split="train")
    extractor, rows = load_extractor("digits"), {}
    for name, train in {"ddpm_hf": train_preset, "plain diffusers loop": train_plain}.items():
        model, numbers, reference = train(arguments, real)
        model.unet.eval()
        sampler = Sampler(name="ddim", num_inference_steps=50).resolve(model)
        images = sample_images(model, sampler, range(arguments.num_images), batch_size=100)
        image_sheet(images[:64], folder / f"{name.split()[0]}.png")
        if name == "ddpm_hf":
            real_features = extract(extractor, reference).features
        distance, _ = frechet_distance_of_features(extract(extractor, images).features, real_features)
        rows[name] = numbers | {"digit FD": distance}
        rows[name]["ratio"] = distance / rows["ddpm_hf"]["digit FD"]
    report({"digits after the same CPU time": rows}, folder / "numbers.json")


def train_preset(arguments, real):
    """Train the preset; return the model, the numbers, and the real images to score against."""
    started = time.process_time()
    flags = ["--preset", arguments.preset, "--dataset_name", arguments.dataset_name, "--logger", "none"]
    run = open_run(parse_config([*flags, "--output_dir", f"{arguments.output_dir}/run", "--overwrite_output_dir"]))
    batches = draw_batches(run)
    run.model.train()
    for taken in tqdm(range(run.total_steps), desc="ddpm_hf"):
        step(run, batches)
        if (taken + 1) % run.config.logging_steps == 0:
            run_due_tasks(run, {"log"}, 0.0)
    seconds = time.process_time() - started
    if seconds > arguments.budget:
        print(f"ddpm_hf took {seconds:.0f} CPU-seconds, more than --budget: the comparison is not fair.")
    return run.pretrained, numbers_of(seconds, run.state.images_seen), run.train_set


def train_plain(arguments, real):
    """Train the plain loop for --budget CPU-seconds; return the model, the numbers, and None."""
    started = time.process_time()
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    batches = loader(real, 32, 64, grey=True)
    loop = PlainLoop(unet, batches, 10 * len(batches), learning_rate=1e-3)  # planned for 10 epochs
    steps = 0
    with tqdm(desc="plain") as bar:
        while time.process_time() - started < arguments.budget:
            loop.step()
            steps += 1
            bar.update()
    seconds = time.process_time() - started
    loop.ema.copy_to(unet.parameters())
    model = Pretrained(unet, make_scheduler("linear", 1000), facts={}, run={}, folder=Path())
    return model, numbers_of(seconds, 64 * steps), None


def numbers_of(seconds: float, images: int) -> dict:
    return {"CPU-seconds": seconds, "images": images}


if __name__ == "__main__":
    main()
