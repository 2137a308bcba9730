"""The stages of gpu.py, each run as a process of its own.

    profile       time of a training step by kind of kernel, number of launches, and the host's time to issue a step
    step          one training step of `cifar10` in variants, and the step of the plain diffusers loop
    loop          the training loop of ddpm_hf, a bare step and the plain diffusers loop, in turns
    sampling      stock DDIMPipeline and the sampling of ddpm_hf, in variants
    train:PRESET  trains until the time is over, and packs a sample sheet, the loss curve and the model

Every measurement is appended at once to a file of JSON lines, {"table", "row", "values"}.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMPipeline
from gpu_train import train
from growth import write_images
from interleaved import race, wall
from plain_diffusers import PlainLoop
from speed import flops_per_image, training_steps

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.models.build import build_unet
from ddpm_hf.models.pretrained import Pretrained
from ddpm_hf.provenance import git_commit
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.sizes import read_size
from ddpm_hf.training.run import open_run


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WARM_UP = 4  # steps before a measurement: cuDNN's search, compilation, and the allocations of AdamW
# The smallest UNet that has all parts.
TOY = ["--dataset_name=digits", "--resolution=8", "--base_channels=8", "--channel_mults=1,2", "--layers_per_block=1"]
TOY += ["--ddpm_num_steps=10", "--ddpm_num_inference_steps=5", "--train_batch_size=4", "--eval_batch_size=2"]


class Stage(NamedTuple):
    """The arguments of every stage."""

    toy: bool
    flags: list[str]  # for the training
    data: dict[str, str]  # preset -> folder of its images
    work: Path
    name: str
    until: float  # the time.time() at which the process is killed

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.time()

    def found(self, table: str, row: str, **values):
        """Append a measurement to the file of the stage."""
        line = json.dumps({"table": table, "row": row, "values": values})
        with open(self.work / f"{self.name.replace(':', '-')}.jsonl", "a") as file:
            file.write(line + "\n")
        print(f"{table} | {row}: {values}", flush=True)

    def attempt(self, table: str, row: str, measure: Callable[[], dict]):
        """Append the values that `measure()` returns, or the reason why there are none.

        An error, e.g. of too little memory, ends only this measurement and not the stage.
        """
        if self.left() < (0 if self.toy else 10):
            self.found(table, row, note="not measured: no time was left")
            return
        print(f"measuring {table} | {row}, {self.left():.0f} s left", flush=True)
        try:
            values = measure()
        except Exception as error:  # whatever torch, cuDNN, a compiler or the driver raises
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            values = {"note": f"failed: {type(error).__name__}: {first[:150]}"}
        self.found(table, row, **values)
        if CUDA:
            torch.cuda.empty_cache()


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="profile, step, loop, sampling or train:PRESET")
    parser.add_argument("--work", required=True, help="folder for the measurements and the runs")
    parser.add_argument(
        "--until", type=float, required=True, help="when the stage must be done, as a value of time.time()"
    )
    parser.add_argument("--data", action="append", default=[], help="PRESET=FOLDER: where the images of a preset are")
    parser.add_argument("--toy", action="store_true", help="tiny networks")
    arguments, flags = parser.parse_known_args(words)
    data = dict(pair.split("=", 1) for pair in arguments.data)
    kind, _, preset = arguments.stage.partition(":")
    stage = Stage(arguments.toy, flags, data, Path(arguments.work), arguments.stage, arguments.until)
    describe_machine(stage)
    if kind == "train":
        train(stage, preset, TOY if stage.toy else [])
    else:
        {"profile": profile, "step": step, "loop": loop, "sampling": sampling}[kind](stage)


def describe_machine(stage: Stage):
    """Append what the measurements depend on: the device and the versions."""
    found = functools.partial(stage.found, "Machine")
    found("device", value=torch.cuda.get_device_name() if CUDA else "CPU")
    found("processor cores", value=os.cpu_count())
    found("torch", value=torch.__version__)
    found("cuDNN", value=str(torch.backends.cudnn.version()))
    found("commit", value=git_commit() or "unknown")


def config_of(stage: Stage, *more: str) -> TrainingConfig:
    """Return the config of a run of `cifar10`, or of a tiny one."""
    recipe = TOY if stage.toy else ["--preset=cifar10"]
    return parse_config([*recipe, "--logger=none", *more, *stage.flags])


# A training step, in variants.

COMPILED = {"mode": "default"}
# Unless its options say otherwise, a variant is eager bfloat16 with fused AdamW and a foreach moving average. The
# slowest to compile come last, because a compilation may use up the time.
VARIANTS = {
    "float32": {"precision": "float32"},
    "TF32": {"precision": "TF32"},
    "bf16": {},
    "bf16, cudnn.benchmark": {"benchmark": True},
    "bf16, channels_last": {"channels_last": True},
    "bf16, cudnn.benchmark, channels_last": {"benchmark": True, "channels_last": True},
    "bf16, CUDA graph": {"graph": True},
    "bf16, cudnn.benchmark, channels_last, CUDA graph": {"benchmark": True, "channels_last": True, "graph": True},
    "bf16, AdamW not fused": {"fused": False},
    "bf16, moving average one tensor at a time": {"foreach_ema": False},
    "bf16, cudnn.benchmark, no dropout": {"benchmark": True, "dropout": False},
    "bf16, cudnn.benchmark, channels_last, batch x 4": {"benchmark": True, "channels_last": True, "times": 4},
    "bf16, compiled": {"compiled": COMPILED},
    "bf16, cudnn.benchmark, compiled": {"benchmark": True, "compiled": COMPILED},
    "bf16, cudnn.benchmark, channels_last, compiled": {
        "benchmark": True,
        "channels_last": True,
        "compiled": COMPILED,
    },
    "bf16, cudnn.benchmark, channels_last, compiled with reduce-overhead": {
        "benchmark": True,
        "channels_last": True,
        "compiled": {"mode": "reduce-overhead"},
    },
}


def make_step(
    config,
    *,
    precision="bf16",
    channels_last=False,
    benchmark=False,
    compiled=None,
    graph=False,
    fused=True,
    foreach_ema=True,
    dropout=True,
    times=1,
) -> tuple[Callable[[], torch.Tensor], int]:
    """Return a function that takes one training step on a fixed batch and returns the loss, and the batch's size.

    A step is forward, backward, clipping, AdamW and the moving average, as in the training loop, without its data.
    """
    set_backends("highest" if precision == "float32" else "high", precision != "float32", benchmark)
    unet = build_unet(config, 3).to(DEVICE).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet.to(memory_format=layout)
    if not dropout:
        for module in unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    weights = list(unet.parameters())
    averages = [weight.detach().clone() for weight in weights]
    # A captured graph replays the kernels only, so the count of the steps has to be on the device.
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=fused or None, capturable=graph)
    batch = times * config.train_batch_size
    noisy, noise, timesteps = fixed_batch(config, batch, layout)
    network = unet
    if compiled is not None:
        torch._dynamo.reset()  # forget the networks of earlier variants
        network = torch.compile(unet, **compiled)

    def take_step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if foreach_ema:
                torch._foreach_lerp_(averages, weights, 1e-4)
            else:
                for average, weight in zip(averages, weights):
                    average.lerp_(weight, 1e-4)
        return loss.detach()

    return (captured(take_step) if graph else take_step), batch


def backends() -> tuple[str, bool, bool]:
    """Return torch's global switches that decide how fast a step is: the arguments of `set_backends`."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


def set_backends(matmul: str = "highest", tf32: bool = True, benchmark: bool = False):
    """Set torch's global switches; by default to torch's own values.

    Args:
        matmul: "highest" multiplies float32 matrices in float32, "high" in TF32.
        tf32: let cuDNN use TF32 for convolutions in float32.
        benchmark: let cuDNN measure its kernels for a convolution and take the fastest.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark


def fixed_batch(config, count: int, layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy images, their noise and their timesteps, equal for all variants."""
    torch.manual_seed(0)
    shape = (count, 3, *read_size(config.resolution))
    noisy, noise = (torch.randn(shape).to(DEVICE).contiguous(memory_format=layout) for _ in range(2))
    return noisy, noise, torch.randint(config.ddpm_num_steps, (count,)).to(DEVICE)


def captured(take_step):
    """Return a function that replays `take_step`, captured as a CUDA graph, and returns its loss."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP - 1):
            take_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = take_step()

    def replay():
        graph.replay()
        return loss

    return replay


def timed(take_step, most_seconds: float, *, warm_up: int = WARM_UP, most: int = 30) -> dict:
    """Return the milliseconds of a step after `warm_up` steps, and those that the host (CPU) needs to issue it.

    Without a GPU the two are equal. If the host needs as long as the step takes, the GPU waits for the host.
    """
    begun = wall()
    for _ in range(warm_up):
        last = wall()
        loss = float(take_step())
    warm, one = wall() - begun, wall() - last
    count = max(1, min(most, int(most_seconds / one)))
    begun = wall()
    for _ in range(count):
        take_step()
    issued, ended = time.perf_counter() - begun, wall() - begun
    return {
        "ms a step": 1000 * ended / count,
        "host ms": 1000 * issued / count,
        "warm-up s": warm,
        f"loss of step {WARM_UP}": loss,
    }


def step(stage: Stage):
    """Measure one training step in all variants, and the plain diffusers loop's step on a fixed batch."""
    config = config_of(stage)
    rate = matrix_rate(1024 if stage.toy else 8192, 1 if stage.toy else 20)
    stage.found("Machine", "bf16 matrix product, TFLOP/s", value=rate / 1e12)
    flops = flops_per_image(build_unet(config, 3).to(DEVICE))
    stage.found("Machine", "GFLOP of an image in a training step", value=flops / 1e9)
    most = {"most_seconds": 0.01 if stage.toy else 2.0}

    def measured(take_step, batch, **options):
        values = timed(take_step, **most, **options)
        speed = batch / values["ms a step"] * 1000
        values |= {
            "images/s": speed,
            "TFLOP/s": speed * flops / 1e12,
            "% of the matrix rate": 100 * speed * flops / rate,
        }
        values["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
        return values

    def variant(options):
        reset_peak()
        take_step, batch = make_step(config, **options)
        return measured(take_step, batch, warm_up=1 if options.get("graph") else WARM_UP)

    def plain(dtype):
        reset_peak()
        set_backends()
        images, _, _ = fixed_batch(config, config.train_batch_size, torch.contiguous_format)
        loop = PlainLoop(build_unet(config, 3), [{"input": images}], 10**6, device=str(DEVICE), dtype=dtype)
        return measured(loop.step, len(images))

    table = f"One training step, batch {config.train_batch_size}"
    dtypes = {"plain diffusers, float32, its default": None, "plain diffusers, bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        stage.attempt(table, name, lambda dtype=dtype: plain(dtype))
    for name, options in variants_here(stage).items():
        stage.attempt(table, name, lambda options=options: variant(options))


def variants_here(stage: Stage) -> dict:
    """Return the variants that this device can run. At toy size nothing is compiled, because that takes minutes."""
    found = {name: dict(options) for name, options in VARIANTS.items() if CUDA or not options.get("graph")}
    if stage.toy:
        for options in found.values():
            if "compiled" in options:
                options["compiled"] = {"disable": True}
    return found


def reset_peak():
    """Begin to measure the peak memory anew."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matrix_rate(side: int, count: int) -> float:
    """Return the operations per second in products of random bfloat16 matrices of side x side."""
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    begun = wall()
    for _ in range(count):
        a @ b
    return 2 * side**3 * count / (wall() - begun)


# Where the time of a step goes.

PROFILED = ["bf16", "bf16, cudnn.benchmark", "bf16, cudnn.benchmark, channels_last"]
PROFILED += ["bf16, cudnn.benchmark, channels_last, compiled"]
# Kind -> parts of the names of torch's operators. The first kind that fits counts.
KINDS = {
    "layout": ("nchwtonhwc", "nhwctonchw"),  # kernels that cuDNN adds around a convolution
    "compiled": ("triton", "compiled"),
    "optimizer": ("adam", "optimizer", "foreach", "vector_norm", "lerp", "clip_grad"),
    "convolution": ("conv",),
    "attention": ("attention", "attn"),
    "matmul": ("mm", "matmul", "linear"),
    "normalisation": ("norm",),
    "copy": ("copy", "cat", "contiguous", "clone", "memcpy", "memset", "fill", "zero", "aten::to", "empty", "pad"),
    "elementwise": ("aten::",),
}


def kind_of(operator: str, kernel: str = "") -> str:
    """Return the kind of work of a kernel, from the name of the torch operator that launched it, and its own name."""
    operator, kernel = operator.lower(), kernel.lower()
    if any(word in kernel for word in KINDS["layout"]):
        return "layout"
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), "other")


def profile(stage: Stage):
    """Measure where one step spends its time, for a few variants."""
    config, variants = config_of(stage), variants_here(stage)
    for name in PROFILED:
        if "compiled" in name and not stage.toy and stage.left() < 100:
            stage.found("Time of a step", name, note="not measured: compiling takes longer than the time left")
            continue
        stage.attempt("Time of a step", name, lambda name=name: profile_step(stage, config, name, variants[name]))


def profile_step(stage: Stage, config, name: str, options: dict) -> dict:
    """Append tables of the time of one step by kind and by kernel, and return its totals."""
    take_step, batch = make_step(config, **options)
    values = timed(take_step, 0.01 if stage.toy else 1.0)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as profiler:
        take_step()
        wall()
    rows = kernels(profiler.events())
    total = sum(milliseconds for _, _, milliseconds in rows)
    for index, table in ((0, f"By kind: {name}"), (1, f"Slowest kernels: {name}")):
        times, counts = Counter(), Counter()
        for row in rows:
            times[row[index]] += row[2]
            counts[row[index]] += 1
        for key, milliseconds in times.most_common(12):
            stage.found(table, key, ms=milliseconds, percent=100 * milliseconds / (total or 1), launches=counts[key])
    return {"device ms": total, "launches": len(rows)} | values


def kernels(events) -> list[tuple[str, str, float]]:
    """Return the (kind, name, milliseconds) of every kernel in a profile; on a CPU, of every operator.

    The profiler links a kernel to the operator that launched it. Kernels without a link are "layout" or "other".
    """
    if not CUDA:
        return [(kind_of(event.name), event.name, event.self_cpu_time_total / 1000) for event in events]
    linked, rows = Counter(), []
    for event in events:
        for kernel in event.kernels if event.device_type == torch.autograd.DeviceType.CPU else []:
            linked[kernel.name] += 1
            rows.append((kind_of(event.name, kernel.name), f"`{kernel.name[:90]}`", kernel.duration / 1000))
    for event in events:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        if is_kernel and not linked[event.name]:
            rows.append((kind_of("", event.name), f"`{event.name[:90]}`", event.time_range.elapsed_us() / 1000))
    return rows


# The whole loop.


def loop(stage: Stage):
    """Compare whole training loops, in turns: ddpm_hf, a bare step, and plain diffusers.

    The images are smooth noise, made here, because speed does not depend on what they show.
    """
    with tempfile.TemporaryDirectory() as folder:
        side, count = (8, 64) if stage.toy else (32, 10_000)
        images = Path(folder, "images")
        images.mkdir()
        write_images(images, count, side)
        flags = [f"--dataset_name={images}", "--validation_split=", f"--output_dir={folder}/run"]
        config = config_of(stage, *flags)
        config.checkpointing_steps = config.save_images_epochs = config.save_model_epochs = 10**9  # only the loop
        set_backends()
        run = open_run(config)
        of_run = (*backends()[:2], config.cudnn_benchmark)  # a training sets it for its steps only
        steps = training_steps(run)
        steps["bare step: bf16, clipping, fused AdamW, EMA"] = make_step(config)[0]
        per_turn, rounds = (1, 1) if stage.toy else (10, 1000)

        def turn(name):
            # The run may set global switches. The plain loop does not get them.
            set_backends(*(() if name.startswith("plain") else of_run))
            for _ in range(per_turn):
                steps[name]()

        turns = {name: functools.partial(turn, name) for name in steps}

        def add(result):
            for name, values in result.items():
                stage.found("Training loop", name, **values)
            return stage.left() > (0 if stage.toy else 15)

        race(turns, rounds, per_turn * config.train_batch_size, after_round=add)


# Sampling.


def sampling(stage: Stage):
    """Compare the sampling of ddpm_hf with stock DDIMPipeline."""
    config = config_of(stage)
    images, steps = (2, 2) if stage.toy else (256, 50)
    scheduler = make_scheduler(config.ddpm_beta_schedule, config.ddpm_num_steps)
    compiled = {"disable": True} if stage.toy else COMPILED

    def unet(channels_last=False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return build_unet(config, 3).eval().requires_grad_(False).to(DEVICE, memory_format=layout)

    def stock(dtype):
        set_backends()
        pipeline = DDIMPipeline(unet(), scheduler.stock())
        pipeline.set_progress_bar_config(disable=True)

        def draw():
            # The pipeline cannot be converted to bfloat16, because it makes a numpy array of its images.
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                pipeline(images, num_inference_steps=steps, output_type="np")

        return speed(draw)

    def ours(dtype, channels_last=False, benchmark=False, compile_it=False):
        set_backends(benchmark=benchmark)
        model = Pretrained(unet(channels_last), scheduler, facts={}, run={}, folder=Path())
        if compile_it:
            torch._dynamo.reset()
            model.unet.compile(**compiled)
        sampler = Sampler(name="ddim", num_inference_steps=steps, dtype=dtype).resolve(model)
        return speed(lambda: sample_images(model, sampler, range(images), batch_size=images, progress=False))

    def speed(draw):
        begun = wall()
        draw()
        warm, seconds = wall() - begun, []
        while len(seconds) < (1 if stage.toy else 3):
            begun = wall()
            draw()
            seconds.append(wall() - begun)
        return {"images/s": images / statistics.median(seconds), "first draw s": warm}

    contenders: dict[str, Any] = {
        "DDIMPipeline, float32": lambda: stock(torch.float32),
        "DDIMPipeline, bf16": lambda: stock(torch.bfloat16),
        "ddpm_hf, float32": lambda: ours("float32"),
        "ddpm_hf, bf16": lambda: ours("bfloat16"),
        "ddpm_hf, bf16, cudnn.benchmark": lambda: ours("bfloat16", benchmark=True),
        "ddpm_hf, bf16, channels_last": lambda: ours("bfloat16", channels_last=True),
        "ddpm_hf, bf16, cudnn.benchmark, channels_last": lambda: ours("bfloat16", True, True),
        "ddpm_hf, bf16, compiled": lambda: ours("bfloat16", compile_it=True),
        "ddpm_hf, bf16, cudnn.benchmark, channels_last, compiled": lambda: ours("bfloat16", True, True, True),
    }
    for name, draw in contenders.items():
        stage.attempt(f"Sampling {images} images in one batch, DDIM in {steps} steps", name, draw)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is written, and clearing up a GPU can take long or hang
