"""Compare the speed of ddpm_hf with plain diffusers and PIL, on the same UNet and data.

    python benchmarks/speed.py --preset mnist --dataset_name FOLDER
    python benchmarks/speed.py --preset cifar10 --train_batch_size 8 --parts training,data,sampling

It measures training, data loading, sampling and start-up, and takes every flag of train_unconditional.py. The
contenders take turns in one process. The results are ratios of their times: 2 means that ddpm_hf needs half the time.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from interleaved import race, report
from plain_diffusers import PlainLoop, loader
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.batches import training_batches
from ddpm_hf.models.build import build_unet
from ddpm_hf.models.pretrained import Pretrained
from ddpm_hf.processes import tuned_convolutions
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.sizes import read_size
from ddpm_hf.training.batches_ahead import draw_batches
from ddpm_hf.training.loop import progress_bar, step
from ddpm_hf.training.periodic import run_due_tasks, what_is_due
from ddpm_hf.training.run import open_run


ROOT = Path(__file__).parent.parent
PLAIN = "plain diffusers loop"
PARTS = ("training", "data", "sampling", "start")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)},memory; default: all except memory"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender; default: 7")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps per turn; default: 5")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="sampling steps; default: 10")
    parser.add_argument("--images", type=int, default=8, help="images sampled per turn; default: 8")
    parser.add_argument(
        "--peak_tflops", type=float, help="peak TFLOP/s of the GPU in bf16, to print the share of it that is used"
    )
    parser.add_argument("--only", choices=["ddpm_hf", PLAIN], help="only train with this loop, to measure its memory")
    parser.add_argument("--json", help="file to write the numbers to; default: only print them")
    arguments, flags = parser.parse_known_args()
    parts = arguments.parts.split(",")
    results = {}
    if "start" in parts:
        results["start, seconds"] = start(flags)
    if "memory" in parts:
        results["peak memory of training, MiB"] = memory(flags)
    if {"training", "data", "sampling"} & set(parts):
        with tempfile.TemporaryDirectory() as folder:
            config = parse_config([*flags, "--output_dir", folder, "--overwrite_output_dir", "--logger", "none"])
            config.checkpointing_steps = 10**9  # never: writing one measures the disk, not the loop
            run = open_run(config)
            if "data" in parts:
                results["data, images/s"] = data(run, arguments)
            if "training" in parts:
                results["training, images/s"] = training(run, arguments)
            if "sampling" in parts:
                results["sampling, images/s"] = sampling(run, arguments)
    report(results, arguments.json)
    # getrusage() would include the memory of the process that started this one.
    print("peak MiB", int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)


def data(run, arguments) -> dict:
    config = run.config
    count = arguments.steps * config.train_batch_size
    batches, plain_batches = training_batches(run.train_set, config, 0, 0, 1), iter(plain_loader(run))

    def take(batches):
        for _ in range(arguments.steps):
            next(batches)

    contenders = {"ddpm_hf": lambda: take(batches), "PIL in the loader": lambda: take(plain_batches)}
    return race(contenders, arguments.rounds, count)


def plain_loader(run):
    config, grey = run.config, run.train_set.channels == 1
    return loader(run.train_set.rows, config.resolution, config.train_batch_size, grey, config.random_flip)


def training(run, arguments) -> dict:
    steps = training_steps(run, arguments.only)
    contenders = {name: lambda take=take: [take() for _ in range(arguments.steps)] for name, take in steps.items()}
    result = race(contenders, arguments.rounds, arguments.steps * run.config.train_batch_size)
    flops = flops_per_image(build_unet(run.config, run.train_set.channels).to(run.accelerator.device))
    for numbers in result.values():
        numbers["TFLOP/s"] = numbers["images_per_second"] * flops / 1e12
        if arguments.peak_tflops:
            numbers["utilisation"] = numbers["TFLOP/s"] / arguments.peak_tflops
    return result


def training_steps(run, only: str | None = None) -> dict:
    """Return the contenders, as name -> function that takes one optimizer step; with `only`, just that one.

    They are the loop of ddpm_hf, the plain diffusers loop in float32 and in bfloat16, and a step without any loop.
    """
    config, device, channels = run.config, run.accelerator.device, run.train_set.channels
    batches, bar = draw_batches(run), progress_bar(run)
    run.model.train()

    def run_step():
        with tuned_convolutions(config.cudnn_benchmark):
            step(run, batches)
        bar.update()
        if due := what_is_due(run):
            run_due_tasks(run, due, 0.0)

    def plain(dtype=None):
        options = {"learning_rate": config.learning_rate, "device": str(device), "dtype": dtype}
        return PlainLoop(build_unet(config, channels), plain_loader(run), 10**6, **options).step

    def bare():
        unet = build_unet(config, channels).to(device)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
        images = torch.randn(config.train_batch_size, channels, *read_size(config.resolution), device=device)
        timesteps = torch.randint(config.ddpm_num_steps, (len(images),), device=device)

        def bare_step():
            with run.accelerator.autocast():
                output = unet(images, timesteps).sample
            torch.nn.functional.mse_loss(output.float(), images).backward()
            optimizer.step()
            optimizer.zero_grad()

        return bare_step

    makers = {
        "ddpm_hf": lambda: run_step,
        PLAIN: plain,
        f"{PLAIN}, bf16": lambda: plain(torch.bfloat16),
        f"one fixed batch, {config.mixed_precision}, no loop": bare,
    }
    return {name: make() for name, make in makers.items() if only in (None, name)}


def flops_per_image(unet) -> float:
    """Return the floating-point operations of one image in a training step: forward and backward."""
    size, channels = unet.config.sample_size, unet.config.in_channels
    images, timesteps = torch.randn(2, channels, size, size, device=unet.device), torch.tensor([1, 2])
    with FlopCounterMode(display=False) as counter:
        unet(images, timesteps.to(unet.device)).sample.mean().backward()
    return counter.get_total_flops() / len(images)


def sampling(run, arguments) -> dict:
    # A new UNet, because accelerate has put mixed precision into the forward() of the run's own.
    unet = build_unet(run.config, run.train_set.channels).eval().to(run.accelerator.device)
    model = Pretrained(unet, run.scheduler, facts={}, run={}, folder=Path())
    pipeline = DDIMPipeline(unet, run.scheduler.stock())
    pipeline.set_progress_bar_config(disable=True)
    count, steps = arguments.images, arguments.num_inference_steps

    def draw(dtype):
        sampler = Sampler(name="ddim", num_inference_steps=steps, dtype=dtype).resolve(model)
        sample_images(model, sampler, range(count), batch_size=count, progress=False)

    contenders = {
        "ddpm_hf, bfloat16": lambda: draw("bfloat16"),
        "ddpm_hf, float32": lambda: draw("float32"),
        "DDIMPipeline": lambda: pipeline(count, num_inference_steps=steps, output_type="np"),
    }
    return race(contenders, arguments.rounds, count)


def start(flags: list[str]) -> dict:
    """Return the seconds until --help is printed, and until the first step of training is done."""
    training = [sys.executable, str(ROOT / "train_unconditional.py")]
    result = {}
    for name, command in {"train --help": training, "ddpm_hf --help": [sys.executable, "-m", "ddpm_hf"]}.items():
        begun = time.perf_counter()
        subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        result[name] = {"seconds": time.perf_counter() - begun}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        command = [*training, *flags, "--output_dir", folder, "--overwrite_output_dir", "--logger", "none"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            said = ""
            while " 1/" not in said:
                said += process.stderr.read(1) or " 1/"
            result["first step"] = {"seconds": time.perf_counter() - begun}
            process.kill()
    return result


def memory(flags: list[str]) -> dict:
    """Return the peak resident memory of a few steps, with each loop in its own process."""
    result = {}
    for name in ("ddpm_hf", PLAIN):
        command = [sys.executable, __file__, "--parts=training", f"--only={name}", "--rounds=1", "--steps=2"]
        done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True)
        result[name] = {"MiB": float(re.search(r"^peak MiB (.*)$", done.stdout, re.MULTILINE)[1])}
    return result


if __name__ == "__main__":
    main()
