"""Measure on a GPU where a training step spends its time and which switches make it faster, and train a model.

    python benchmarks/gpu.py --minutes 9 --out runs/gpu
    python benchmarks/gpu.py --stages step=300,sampling --out runs/gpu
    python benchmarks/gpu.py --stages train:afhq-cat-64 --data afhq-cat-64=FOLDER --out runs/gpu
    python benchmarks/gpu.py --toy --minutes 5 --out runs/toy

The stages are described in gpu_stages.py. Each is a process of its own, which is killed when its time is over. The
other stages still run. The tables are written again after every measurement, so a kill loses none of them. All other
flags are those of train_unconditional.py, for every stage.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from tables import markdown_table

from ddpm_hf.config.presets import PRESETS
from ddpm_hf.files import write_beside, write_json


ROOT = Path(__file__).parent.parent
STAGES = Path(__file__).with_name("gpu_stages.py")
# The stages, and how they share the time: of two stages, one with twice the number gets twice the seconds.
SHARES = {"profile": 1, "step": 4, "loop": 2, "sampling": 2, "train": 6}
DEFAULT = "profile,step,loop,sampling,train:cifar10"
# The folder --out stays small enough for a machine that gives back only a few files.
MOST_FILES = 8
MOST_BYTES = 60 * 2**20
LOG_LINES = 100  # of each stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=DEFAULT, help=f"stages, each as NAME or NAME=SECONDS; default: {DEFAULT}")
    parser.add_argument("--minutes", type=float, default=10, help="time for all stages together; default: 10")
    parser.add_argument("--out", required=True, help="new or empty folder for the tables, pictures and weights")
    parser.add_argument("--work", help="folder for logs and runs; a second call continues the runs; default: OUT-work")
    parser.add_argument("--data", action="append", default=[], help="PRESET=FOLDER: where the images of a preset are")
    parser.add_argument("--toy", action="store_true", help="tiny networks, to try everything out on a CPU")
    arguments, flags = parser.parse_known_args()
    out = Path(arguments.out)
    work = Path(arguments.work or f"{out}-work")
    try:
        stages = read_stages(arguments.stages)
        check_data(arguments.data)
    except ValueError as error:
        parser.error(str(error))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out} is not empty: give a new folder.")
    if not 0 < arguments.minutes < 10_000:
        parser.error(f"--minutes is {arguments.minutes:g}: give a number of minutes above 0, e.g. 9.")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    # `timeout` and job queues send SIGTERM. Leave through `finally`, which ends the stage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    more = [*(["--toy"] if arguments.toy else []), *(f"--data={pair}" for pair in arguments.data), *flags]
    measure(stages, 60 * arguments.minutes, out, work, more)


def read_stages(text: str) -> list[tuple[str, float | None]]:
    """Return the (name, seconds) of each stage in e.g. "step=60,train:cifar10". The seconds are None if not given.

    Raises:
        ValueError: for a stage that does not exist, or for seconds that are not a number.
    """
    stages = []
    for word in text.split(","):
        name, _, seconds = word.partition("=")
        kind, _, preset = name.partition(":")
        if kind not in SHARES or (kind == "train") != (preset in PRESETS) or bool(preset) != (kind == "train"):
            known = ", ".join(SHARES).replace("train", "train:PRESET")
            raise ValueError(
                f"--stages has {word!r}: choose from {known}, where PRESET is one of {', '.join(PRESETS)}."
            )
        try:
            stages.append((name, float(seconds) if seconds else None))
        except ValueError:
            raise ValueError(f"--stages has {word!r}: give a number of seconds after the =.") from None
    return stages


def check_data(pairs: list[str]):
    """Raise a ValueError if one of `pairs` is not PRESET=FOLDER."""
    for pair in pairs:
        if pair.partition("=")[0] not in PRESETS or not pair.partition("=")[2]:
            raise ValueError(f"--data is {pair!r}: give PRESET=FOLDER, where PRESET is one of {', '.join(PRESETS)}.")


def measure(stages: list, seconds: float, out: Path, work: Path, flags: list[str]):
    """Run the stages one after another in `seconds` together, and collect in `out` what they found."""
    end, outcomes = time.monotonic() + seconds, {}
    for name, _ in stages:
        for path in stage_files(name, work):
            path.unlink(missing_ok=True)  # of an earlier call
    for position, (name, _) in enumerate(stages):
        share = seconds_for(stages[position:], end - time.monotonic())
        print(f"{name}: {share:.0f} s at most", flush=True)
        outcomes[name] = {"seconds given": share, "outcome": "running"}
        run_stage(name, share, work, flags, lambda: write_tables(stages, outcomes, out, work), outcomes[name])
        print(f"{name}: {outcomes[name]['outcome']}, {outcomes[name]['seconds taken']:.0f} s", flush=True)
        write_log(stages, out, work)
        keep_pictures(stages, out, work)
        keep_weights(name, out, work, outcomes)
        write_tables(stages, outcomes, out, work)
    print("\n" + (out / "tables.md").read_text(), flush=True)


def seconds_for(stages: list, left: float) -> float:
    """Return the seconds of the first of `stages`: its own, or its share of what is left for all of them."""
    shares = {name: SHARES[name.partition(":")[0]] for name, own in stages if own is None}
    name, own = stages[0]
    if own is not None:
        return max(0.0, min(own, left))
    free = left - sum(seconds for _, seconds in stages if seconds is not None)
    return max(0.0, free * shares[name] / sum(shares.values()))


def stage_files(name: str, work: Path) -> tuple[Path, Path, Path]:
    """Return the files of a stage: its measurements as JSON lines, its log, and its picture."""
    return tuple(work / f"{name.replace(':', '-')}{suffix}" for suffix in (".jsonl", ".log", ".png"))


# Six parameters: a stage needs its name, time, folder and flags, and the caller gets two kinds of report.
def run_stage(name: str, seconds: float, work: Path, flags: list[str], on_figure, outcome: dict):
    """Run one stage as a process, and kill it after `seconds`. Write into `outcome` how it ended.

    `on_figure()` is called whenever the stage has written a new measurement.
    """
    figures, log, _ = stage_files(name, work)
    command = [sys.executable, str(STAGES), name, f"--work={work}", f"--until={time.time() + seconds}", *flags]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begun, size, killed = time.monotonic(), 0, False
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": path}, process_group=0
        )
        try:
            while process.poll() is None and not killed:
                time.sleep(0.1)
                killed = time.monotonic() - begun > seconds
                if figures.is_file() and figures.stat().st_size != size:
                    size = figures.stat().st_size
                    on_figure()
        finally:
            end_group(process)
    said = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    outcome["seconds taken"] = time.monotonic() - begun
    outcome["outcome"] = "killed when its time was over" if killed else f"ended with code {process.returncode}"
    if killed or process.returncode:
        outcome["last line"] = said[-1][:200] if said else "(it printed nothing)"
    else:
        outcome["outcome"] = "complete"


def end_group(process: subprocess.Popen):
    """End a process and those that it started, e.g. the workers that compile."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)  # a process that waits for a broken driver cannot be killed: leave it


def read_figures(stages: list, work: Path) -> dict[str, dict]:
    """Return what the stages have found so far, as tables: title -> row -> column -> value."""
    tables = {}
    for name, _ in stages:
        path = stage_files(name, work)[0]
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut the last line
                found = json.loads(line)
                tables.setdefault(found["table"], {}).setdefault(found["row"], {}).update(found["values"])
    return tables


def write_tables(stages: list, outcomes: dict, out: Path, work: Path):
    """Write everything that was found so far as tables.md and tables.json."""
    tables = {"Stages": outcomes, **read_figures(stages, work)}
    text = "\n\n".join(markdown_table(title, rows) for title, rows in tables.items())
    write_beside(out / "tables.md", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    write_json(out / "tables.json", tables)


def write_log(stages: list, out: Path, work: Path):
    """Write log.txt with the last lines that each stage printed."""
    parts = []
    for name, _ in stages:
        log = stage_files(name, work)[1]
        if log.is_file():
            lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
            parts += [f"==== {name}", *lines[-LOG_LINES:]]
    write_beside(out / "log.txt", lambda path: path.write_text("\n".join(parts) + "\n", encoding="utf-8"))


def keep_pictures(stages: list, out: Path, work: Path):
    """Write the pictures of all stages, one below the other, as pictures.png."""
    paths = [stage_files(name, work)[2] for name, _ in stages]
    pictures = [Image.open(path).convert("RGB") for path in paths if path.is_file()]
    if pictures:
        stack_pictures(pictures).save(out / "pictures.png")


def stack_pictures(pictures: list[Image.Image]) -> Image.Image:
    """Return one picture with these below each other, on white."""
    page = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def keep_weights(name: str, out: Path, work: Path, outcomes: dict):
    """Copy the packed model of a stage to `out`, if it has one and there is room."""
    preset = name.partition(":")[2]
    parts = sorted((work / f"{preset}.packed").glob("*")) if preset else []
    if not parts:
        return
    files = [*out.iterdir(), *parts]
    if len(files) <= MOST_FILES and sum(path.stat().st_size for path in files) <= MOST_BYTES:
        for part in parts:
            shutil.copyfile(part, out / part.name)
        outcomes[name]["model"] = f"{parts[0].stem}.*"
    else:
        outcomes[name]["model"] = f"no room for it here; it is in {parts[0].parent.name} of the work folder"


if __name__ == "__main__":
    main()
