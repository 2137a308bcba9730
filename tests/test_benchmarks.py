"""The benchmarks start: their imports exist, and the one of speed runs at its smallest size."""

import json
import runpy
import sys

import pytest
from conftest import ROOT, TINY


@pytest.fixture
def benchmark(monkeypatch):
    """Run a benchmark in this process, which has imported torch already, with the given flags."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(name, *flags):
        path = ROOT / "benchmarks" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.mark.parametrize("name", ["growth", "restoration", "space_load", "speed", "time_to_quality"])
def test_a_benchmark_shows_its_help(name, benchmark, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark(name, "--help")
    assert stopped.value.code == 0 and f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_the_speed_of_everything_in_one_process_is_measured(benchmark, tmp_path):
    small = ["--rounds=1", "--steps=1", "--images=2", "--num_inference_steps=2", f"--json={tmp_path / 'speed.json'}"]
    benchmark("speed", *TINY, *small, "--parts=data,training,sampling")
    results = json.loads((tmp_path / "speed.json").read_text())
    assert list(results) == ["data, images/s", "training, images/s", "sampling, images/s"]
    assert all(row["images_per_second"] > 0 for rows in results.values() for row in rows.values())
