"""Measure how start-up, data loading and memory grow with the number and the size of the images.

    python benchmarks/growth.py --json growth.json --plot growth.png

The images are smooth noise, stored as PNG in Parquet, as on the Hub: a thousand different ones, repeated. Each size is
measured in its own process: seconds until a run is open, images per second in batches of 128, and peak memory. The
training itself costs the same for any number of images.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from interleaved import report
from PIL import Image

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.batches import training_batches
from ddpm_hf.training.run import open_run


SIZES = [(1_000, 32), (10_000, 32), (60_000, 32), (1_000_000, 32), (1_000, 64), (1_000, 128), (1_000, 256)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the numbers to; default: only print them")
    parser.add_argument("--plot", help="PNG file to plot the numbers in; default: no plot")
    parser.add_argument("--one", help="only measure this folder of Parquet files; the program calls itself so")
    parser.add_argument("--resolution", type=int, default=32, help="height and width in pixels for --one; default: 32")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.resolution)))
        return
    rows = {}
    for count, side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), count, side)
            command = [sys.executable, __file__, "--one", folder, "--resolution", str(side)]
            environment = os.environ | {"HF_HOME": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            rows[f"{count:,} of {side}x{side}"] = json.loads(done.stdout.splitlines()[-1])
            print(rows, flush=True)
    report({"growth": rows}, arguments.json)
    if arguments.plot:
        draw(rows, arguments.plot)


def write_images(folder: Path, count: int, side: int):
    random, different = np.random.default_rng(0), []
    for _ in range(min(count, 1000)):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
        different.append({"bytes": buffer.getvalue(), "path": None})
    images = pa.array(different, pa.struct({"bytes": pa.binary(), "path": pa.string()})).take(
        pa.array(np.arange(count) % len(different))
    )
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = pa.table({"image": images}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=1000)


def measure(folder: str, side: int) -> dict:
    started = time.perf_counter()
    flags = ["--dataset_name", folder, "--resolution", str(side), "--train_batch_size", "128", "--logger", "none"]
    flags += ["--base_channels", "8", "--channel_mults", "1,2", "--layers_per_block", "1", "--random_flip"]
    with tempfile.TemporaryDirectory() as output:
        run = open_run(parse_config([*flags, "--output_dir", output, "--overwrite_output_dir"]))
    opened = time.perf_counter()
    batches = training_batches(run.train_set, run.config, 0, 0, 1)
    next(batches)
    started_drawing, drawn = time.perf_counter(), 0
    while time.perf_counter() - started_drawing < 3:
        drawn += len(next(batches)["images"])
    speed = drawn / (time.perf_counter() - started_drawing)
    # getrusage() would include the memory of the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    held = int(run.train_set.pixels is not None)
    return {"seconds to open": opened - started, "images/s": speed, "in memory": held, "peak MiB": peak}


def draw(rows: dict, path: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, what in zip(axes, ("seconds to open", "images/s", "peak MiB")):
        for along, label in ((0, "images of 32x32"), (1, "pixels a side, 1,000 images")):
            chosen = [size for size in SIZES if size[1 - along] == (32, 1_000)[along]]
            values = [rows[f"{count:,} of {side}x{side}"][what] for count, side in chosen]
            axis.plot([size[along] for size in chosen], values, "o-", label=label)
        axis.set(xscale="log", yscale="log", title=what)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
