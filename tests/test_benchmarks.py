"""The benchmarks start: their imports exist, and those of speed and of a GPU run at their smallest size."""

import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY
from PIL import Image

from ddpm_hf.models.pretrained import load_pretrained


@pytest.fixture
def benchmark(monkeypatch):
    """Run a benchmark in this process, which has imported torch already, with the given flags."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(name, *flags):
        path = ROOT / "benchmarks" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.mark.parametrize(
    "name", ["gpu", "growth", "init_from", "restoration", "space_load", "speed", "time_to_quality"]
)
def test_a_benchmark_shows_its_help(name, benchmark, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark(name, "--help")
    assert stopped.value.code == 0 and f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_the_growth_plot_shows_the_table_of_the_results(benchmark, tmp_path):
    page = ROOT / "docs" / "results.md"
    benchmark("growth", f"--from_page={page}", f"--plot={tmp_path / 'growth.png'}")
    assert Image.open(tmp_path / "growth.png").size == Image.open(ROOT / "docs/images/growth.png").size
    growth = importlib.import_module("growth")
    rows = growth.read_table(page.read_text())
    assert [*rows] == [f"{count:,} of {side}x{side}" for count, side in growth.SIZES]
    millions = {"seconds to open": 7.1, "images/s": 3600, "in memory": 0, "peak MiB": 2501}
    assert rows["1,000,000 of 32x32"] == millions


def test_the_speed_of_everything_in_one_process_is_measured(benchmark, tmp_path):
    small = ["--rounds=1", "--steps=1", "--images=2", "--num_inference_steps=2", f"--json={tmp_path / 'speed.json'}"]
    benchmark("speed", *TINY, *small, "--parts=data,training,sampling")
    results = json.loads((tmp_path / "speed.json").read_text())
    assert list(results) == ["data, images/s", "training, images/s", "sampling, images/s"]
    assert all(row["images_per_second"] > 0 for rows in results.values() for row in rows.values())


# gpu.py and its stages.

STAGES = ["profile", "step", "loop", "sampling", "train:digits"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def tables_of(text):
    """Return the tables of a page in Markdown, {title: rows of cells}, of which each has as many cells as its head."""
    tables = {}
    for block in text.strip().split("\n\n**"):
        title, _, *lines = block.removeprefix("**").splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}, block
        tables[title.removesuffix("**")] = [[cell.strip() for cell in row] for row in rows]
    return tables


def test_every_stage_of_the_gpu_benchmark_reports_at_toy_size(gpu, tmp_path):
    log = tmp_path / "printed"
    children = []
    for name in STAGES:
        # The training finds its time over when it begins, so it stops after its first step.
        until = time.time() + (0 if name.startswith("train") else 600)
        words = [name, f"--work={tmp_path}", f"--until={until}", "--toy"]
        children.append(processes.start(log, *words, program="gpu_stages"))
    processes.ended(children, log)
    stages, out = [(name, None) for name in STAGES], tmp_path / "out"
    out.mkdir()
    outcomes = {name: {} for name in STAGES}
    gpu.keep_pictures(stages, out, tmp_path)
    gpu.keep_weights("train:digits", out, tmp_path, outcomes)
    gpu.write_tables(stages, outcomes, out, tmp_path)
    assert {path.name for path in out.iterdir()} == {"tables.md", "tables.json", "pictures.png", "digits.tar.xz.01"}
    found = json.loads((out / "tables.json").read_text())
    assert list(tables_of((out / "tables.md").read_text())) == list(found)
    assert "failed" not in (out / "tables.md").read_text()
    kinds = found["By kind: bf16"]
    assert {"convolution", "matmul", "normalisation", "elementwise", "optimizer"} <= set(kinds)
    assert sum(row["percent"] for row in kinds.values()) == pytest.approx(100)
    steps = found["One training step, batch 4"]
    assert len(steps) > 15 and all(row["images/s"] > 0 for row in steps.values())
    losses = {
        name: row["loss of step 4"] for name, row in steps.items() if name.startswith("bf16, cudnn.benchmark, c")
    }
    assert (
        len(found["Training loop"]) == 5 and len(next(rows for title, rows in found.items() if "DDIM" in title)) == 9
    )
    assert losses.pop("bf16, cudnn.benchmark, channels_last, batch x 4") and max(losses.values()) == pytest.approx(
        steps["float32"]["loss of step 4"], rel=0.05
    )
    assert Image.open(out / "pictures.png").width > 100
    assert list((tmp_path / "runs" / "digits").glob("checkpoint-*"))  # the signal was caught


def test_a_packed_model_is_that_of_the_run_in_bfloat16(gpu, tiny_run, tmp_path, monkeypatch):
    import gpu_train

    monkeypatch.setattr(gpu_train, "PART_BYTES", 10_000)
    monkeypatch.setattr(gpu_train, "CHUNK", 4096)
    parts = gpu_train.pack(tiny_run, "tiny", tmp_path / "packed")
    assert len(parts) > 1 and all(part.stat().st_size <= 10_000 for part in parts)
    subprocess.run(f"cat {tmp_path}/packed/tiny.tar.xz.* | tar xJ", shell=True, check=True, cwd=tmp_path)
    unpacked = safetensors.torch.load_file(tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors")
    weights = load_pretrained(tiny_run).unet.state_dict()
    assert unpacked.keys() == weights.keys()
    assert all(torch.equal(unpacked[name], value.bfloat16()) for name, value in weights.items())
    loaded = load_pretrained(tmp_path / "tiny").unet
    assert loaded.dtype == torch.float32 and torch.equal(loaded.conv_in.weight, weights["conv_in.weight"].bfloat16())


STAGE = """
import json, pathlib, subprocess, sys, time
name, work = sys.argv[1], pathlib.Path(sys.argv[2].removeprefix("--work="))
with open(work / f"{name.replace(':', '-')}.jsonl", "w") as file:
    print(json.dumps({"table": f"Of {name}", "row": "a | b", "values": {"x": 1.5}}), file=file)
    print('{"table": "half a li', end="", file=file)
if name == "step":
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    time.sleep(600)
if name == "loop":
    sys.exit("loop: error: a reason")
if name.startswith("train"):
    folder = work / f"{name[6:]}.packed"
    folder.mkdir()
    for k in range(3):
        (folder / f"{name[6:]}.tar.xz.0{k}").write_bytes(b"x")
"""


def test_a_stage_that_overruns_its_time_is_killed_and_the_others_report(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.setattr(gpu, "STAGES", tmp_path / "stage.py")
    stages = "profile,step=1,loop,sampling,train:digits,train:mnist"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stages", stages, "--minutes", "2", "--out", f"{tmp_path / 'out'}"])
    before = signal.getsignal(signal.SIGTERM)
    gpu.main()
    signal.signal(signal.SIGTERM, before)
    found = json.loads((tmp_path / "out" / "tables.json").read_text())
    outcomes = {name: row["outcome"] for name, row in found["Stages"].items()}
    complete = dict.fromkeys(["profile", "sampling", "train:digits", "train:mnist"], "complete")
    assert outcomes == complete | {"step": "killed when its time was over", "loop": "ended with code 1"}
    assert found["Stages"]["loop"]["last line"] == "loop: error: a reason"
    assert all(found[f"Of {name}"] == {"a | b": {"x": 1.5}} for name in outcomes)
    assert tables_of((tmp_path / "out" / "tables.md").read_text())["Of step"][2] == ["a \\| b", "1.5"]
    # What the stage had started has ended too; a moment may pass until its parent, init, has collected it.
    child = Path(f"/proc/{found['Stages']['step']['last line']}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    # The model of a second training has no room any more.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tables.md", "tables.json", "log.txt", *(f"digits.tar.xz.0{k}" for k in range(3))}
    assert "no room" in found["Stages"]["train:mnist"]["model"]


def test_stages_share_the_time_and_leave_the_rest_to_later_ones(gpu):
    stages = [("profile", None), ("step", 100.0), ("loop", None), ("sampling", None), ("train:digits", None)]
    assert gpu.seconds_for(stages, 1200) == 100  # a share of 1 in 11 of the 1,100 s that no stage has to itself
    assert gpu.seconds_for(stages[1:], 1190) == 100
    assert gpu.seconds_for(stages[1:], 60) == 60
    assert gpu.seconds_for(stages[4:], 700) == 700
    assert gpu.seconds_for(stages[4:], -5) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "step,speed"], "--stages has 'speed': choose from profile, step, loop, sampling, train:PRESET"),
        (["--stages", "train:cifra10"], "--stages has 'train:cifra10'"),
        (["--stages", "step=soon"], "--stages has 'step=soon': give a number of seconds after the =."),
        (["--data", "cifra10=here"], "--data is 'cifra10=here': give PRESET=FOLDER"),
        (["--out", "."], "is not empty: give a new folder."),
        (["--minutes", "-3"], "--minutes is -3: give a number of minutes above 0"),
        (["--minutes", "nan"], "--minutes is nan: give a number of minutes above 0"),
    ],
)
def test_the_gpu_benchmark_refuses_before_it_starts(flags, said, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "new", *flags])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_kernels_of_a_gpu_count_by_the_operator_that_launched_them(gpu, monkeypatch):
    """Events as the profiler returns them on a GPU: a kernel is in its operator's list, and an event of its own."""
    import gpu_stages

    monkeypatch.setattr(gpu_stages, "CUDA", True)
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def operator(name, **kernels):
        listed = [SimpleNamespace(name=each, duration=us) for each, us in kernels.items()]
        return SimpleNamespace(name=name, device_type=cpu, kernels=listed)

    def kernel(name, us, is_user_annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=cuda, time_range=span, is_user_annotation=is_user_annotation)

    launched = {"sm90_xmma_fprop": 3000, "nchwToNhwcKernel": 500, "fused_adam": 250}
    events = [
        operator("aten::cudnn_convolution", sm90_xmma_fprop=3000, nchwToNhwcKernel=500),
        operator("aten::_fused_adamw_", fused_adam=250),
        operator("aten::view"),
        *(kernel(name, us) for name, us in launched.items()),
        kernel("unknown_kernel", 125),
        kernel("ProfilerStep#1", 9000, is_user_annotation=True),
    ]
    assert gpu_stages.kernels(events) == [
        ("convolution", "`sm90_xmma_fprop`", 3.0),
        ("layout", "`nchwToNhwcKernel`", 0.5),
        ("optimizer", "`fused_adam`", 0.25),
        ("other", "`unknown_kernel`", 0.125),
    ]
    names = {"aten::addmm": "matmul", "aten::native_group_norm_backward": "normalisation", "aten::silu": "elementwise"}
    names |= {
        "aten::_flash_attention_forward": "attention",
        "aten::copy_": "copy",
        "triton_poi_fused_silu_0": "compiled",
    }
    assert {name: gpu_stages.kind_of(name) for name in names} == names
