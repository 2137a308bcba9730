"""Measure how start-up, data loading and memory grow with the number and the size of the images.

    python benchmarks/growth.py --json growth.json --plot growth.png
    python benchmarks/growth.py --from_page docs/results.md --plot docs/images/growth.png

The images are smooth noise, stored as PNG in Parquet, as on the Hub: a thousand different ones, repeated. Each size is
measured in its own process: seconds until a run is open, images per second in batches of 128, and peak memory. The
training itself costs the same for any number of images. The second command only draws the plot, from the
table of a page.
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
    parser.add_argument("--from_page", help="Markdown page whose table has the numbers; default: measure them")
    parser.add_argument("--one", help="only measure this folder of Parquet files; the program calls itself like this")
    parser.add_argument("--resolution", type=int, default=32, help="height and width in pixels for --one; default: 32")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.resolution)))
        return
    rows = read_table(Path(arguments.from_page).read_text()) if arguments.from_page else measure_all()
    if not arguments.from_page:
        report({"growth": rows}, arguments.json)
    if arguments.plot:
        draw(rows, arguments.plot)


def measure_all() -> dict:
    rows = {}
    for count, side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), count, side)
            command = [sys.executable, __file__, "--one", folder, "--resolution", str(side)]
            environment = os.environ | {"HF_HOME": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            rows[f"{count:,} of {side}x{side}"] = json.loads(done.stdout.splitlines()[-1])
            print(rows, flush=True)
    return rows


def read_table(page: str) -> dict:
    """Return the numbers of each size in the table of a Markdown page, as `measure` returns them."""
    rows = {}
    for size, seconds, speed, in_memory, peak in re.findall(
        r"^\| ([\d,]+ of \d+x\d+) \| ([\d.,]+) \| ([\d.,]+) \| (yes|no)[^|]*\| ([\d.,]+)", page, re.MULTILINE
    ):
        seconds, speed, peak = (float(text.strip(",").replace(",", "")) for text in (seconds, speed, peak))
        held = int(in_memory == "yes")
        rows[size] = {"seconds to open": seconds, "images/s": speed, "in memory": held, "peak MiB": peak}
    return rows


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
    """Plot each number against the number of images, in the upper row, and against their size, in the lower row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(2, 3, sharey="col")
    whats = {
        "seconds to open": "seconds to open a run",
        "images/s": "images per second",
        "peak MiB": "peak memory in MiB",
    }
    for along, along_name in ((0, "number of images, 32x32 px"), (1, "side of 1,000 images in px")):
        chosen = [size for size in SIZES if size[1 - along] == (32, 1_000)[along]]
        places = [size[along] for size in chosen]
        for axis, (what, title) in zip(panels[along], whats.items()):
            measured = [rows[f"{count:,} of {side}x{side}"] for count, side in chosen]
            axis.plot(places, [row[what] for row in measured], "-", color="#1f6fb4")
            for place, row in zip(places, measured):
                fill = "#1f6fb4" if row["in memory"] else "white"
                axis.plot(place, row[what], "o", color="#1f6fb4", markerfacecolor=fill, markersize=7)
                text = f"{row[what]:,.2g}" if row[what] < 10 else f"{row[what]:,.0f}"
                look = dict(ha="center", fontsize=9, bbox=dict(facecolor="white", edgecolor="none", pad=1, alpha=0.8))
                axis.annotate(text, (place, row[what]), (0, 10), textcoords="offset points", **look)
            is_memory = what == "peak MiB"
            axis.set(xscale="log", yscale="linear" if is_memory else "log", xlabel=along_name, ylabel=title)
            axis.yaxis.set_major_formatter("{x:,.12g}")
            axis.set_xticks(places, [f"{place:,}" for place in places], minor=False)
            axis.minorticks_off()
            axis.margins(x=0.15, y=0.25)
            if is_memory:
                axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    figure.suptitle("filled: the pixels are kept in memory; empty: decoded when needed", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
