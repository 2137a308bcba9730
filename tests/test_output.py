"""An output that is closed, full or ASCII-only drops messages and never ends the work."""

import io
import os
import signal
import subprocess
import sys
import time

import processes
import pytest
from conftest import ROOT, TWO_DIGITS

from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.output import LossyStream, drop_failing_output
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training.loop import train


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that no process reads, as `| head` leaves it."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def start(output, *arguments):
    words = [sys.executable, "-m", "ddpm_hf", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, stdout=output, stderr=output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_whose_output_is_closed_loses_nothing(tmp_path, number):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    flags = ["--max_train_steps=100000", "--checkpointing_steps=100000"]
    child = processes.start(tmp_path / "pipe", *TWO_DIGITS, *flags, f"--output_dir={tmp_path / 'run'}")
    deadline = time.time() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    os.close(reading)  # as `tee` does, which Ctrl-C ends first
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number
    assert len(checkpoints(tmp_path / "run")) == 1 and (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["presets", "digits"]])
def test_a_command_whose_output_is_closed_ends_well(closed_pipe, arguments):
    assert start(closed_pipe, *arguments).wait(60) == 0


def test_a_refusal_that_cannot_be_printed_keeps_its_exit_code(closed_pipe):
    assert start(closed_pipe, "presets", "nothing").wait(60) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_output_ends_nothing(tmp_path):
    child = processes.start("/dev/full", *TWO_DIGITS, "--max_train_steps=2", f"--output_dir={tmp_path / 'run'}")
    child.join(60)
    assert child.exitcode == 0
    assert (tmp_path / "run" / "figures" / "loss.png").exists()


def test_an_ascii_output_escapes_what_it_cannot_show(tmp_path, monkeypatch):
    folder, printed = tmp_path / "Zahlen \u00fc\u4e2d", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    train(parse_config([*TWO_DIGITS, "--max_train_steps=1", f"--output_dir={folder}"]))
    sys.stdout.flush()
    assert rb"Zahlen \xfc\u4e2d" in printed.getvalue() and (folder / "figures" / "loss.png").exists()


def test_an_output_that_is_missing_is_replaced(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    drop_failing_output()
    main(["presets"])
    assert sys.stdout.write("text") == 4
    before = sys.stdout
    drop_failing_output()
    assert sys.stdout is before


def test_a_stream_that_was_closed_drops_text(tmp_path):
    with open(tmp_path / "log", "w") as file:
        stream = LossyStream(file)
        print("kept", file=stream, flush=True)
    print("dropped", file=stream, flush=True)
    stream.writelines(["dropped"])
    assert (tmp_path / "log").read_text() == "kept\n" and stream.encoding.lower() == "utf-8"
