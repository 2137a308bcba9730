"""Only one process writes to a run folder, to a set of samples, or under the name of a record."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import processes
import pytest
from conftest import TWO_DIGITS

from ddpm_hf import UserError, locks
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.evaluation import evaluate
from ddpm_hf.evaluation.records import write_new_record
from ddpm_hf.locks import check_unlocked, locked, writer_of
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.run_folder import checkpoints, step_of
from ddpm_hf.sampling import sample_set
from ddpm_hf.sampling.sample_set import draw_samples, read_samples
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.training import figures
from ddpm_hf.training.checkpoints import find_checkpoint
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import open_run


def config(folder, *flags):
    return parse_config([*TWO_DIGITS, "--max_train_steps=3", f"--output_dir={folder}", *flags])


def listing(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_run_in_the_folder_of_a_live_one_is_a_sentence_and_changes_nothing(tmp_path, resumed):
    folder, latest = tmp_path / "run", "--resume_from_checkpoint=latest"
    if resumed:
        train(config(folder, "--checkpointing_steps=1"))
    with open_run(config(folder, "--max_train_steps=5", *([latest] if resumed else []))).lock:
        before = listing(folder)
        said = rf"run is in use, process {os.getpid()} on \S+ writes to it: wait until that run ends, or give another"
        for flag in ("--seed=1", latest, "--overwrite_output_dir"):
            with pytest.raises(UserError, match=said):
                train(config(folder, flag))
        assert listing(folder) == before
        assert train(config(folder, "--dry_run", latest)) is None
    assert train(config(folder, latest)).finished


def test_a_finished_a_refused_and_a_failed_run_leave_no_lock(tmp_path, monkeypatch):
    train(config(tmp_path / "run"))
    with pytest.raises(UserError, match="--logger tensorboard cannot start"):
        (tmp_path / "run" / "own").mkdir()
        (tmp_path / "run" / "own" / "file").touch()
        train(config(tmp_path / "run", "--overwrite_output_dir", "--logger=tensorboard", "--logging_dir=own/file"))
    monkeypatch.setattr("ddpm_hf.training.loop.step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path / "run", "--overwrite_output_dir"))
    assert not list(tmp_path.rglob("*.lock")) and not locks.HELD


def test_of_two_runs_that_start_together_in_a_new_folder_one_goes_on(tmp_path):
    folder = tmp_path / "run"
    command = [*TWO_DIGITS, "--max_train_steps=10", "--checkpointing_steps=5", f"--output_dir={folder}"]
    children = [processes.start(tmp_path / f"{seed}.log", *command, f"--seed={seed}") for seed in (0, 1)]
    for child in children:
        child.join(120)
    logs = [(tmp_path / f"{seed}.log").read_text() for seed in (0, 1)]
    assert sorted(child.exitcode for child in children) == [0, 2], logs
    winner = children[1].exitcode == 0
    assert "Traceback" not in logs[not winner] and "is in use" in logs[not winner]
    flags = [json.loads(path.read_text())["flags"] for path in folder.rglob("train_config.json")]
    assert len(flags) == 3 and {each["seed"] for each in flags} == {int(winner)}


def test_a_requeued_run_beside_a_live_one_leaves_it_alone_and_takes_over_when_it_is_killed(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [*TWO_DIGITS, "--max_train_steps=4000", "--checkpointing_steps=2", "--checkpoints_total_limit=2"]
    command += [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    child = processes.start(log, *command)
    deadline = time.time() + 60
    while not (folder / "checkpoint-2").exists() and time.time() < deadline:
        time.sleep(0.01)
    said = processes.finish(tmp_path / "second.log", *command, code=2)
    assert f"{folder} is in use, process {child.pid} on" in said and "Traceback" not in said
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    last = step_of(checkpoints(folder)[-1])
    processes.finish(tmp_path / "third.log", *command, f"--max_train_steps={last + 4}")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def sleep_in_child(pipe):
    pipe.send("ready")
    time.sleep(60)


def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    with locked(tmp_path, "wait"):
        child = fork.Process(target=sleep_in_child, args=(theirs,))
        child.start()
        assert ours.recv() == "ready" and writer_of(tmp_path) is not None
    try:
        (tmp_path / locks.LOCK).touch()
        assert writer_of(tmp_path) is None
        with locked(tmp_path, "wait"):
            pass
    finally:
        child.kill()
        child.join()


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(locks.errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locked(tmp_path, "wait"), locked(tmp_path, "wait"):
        check_unlocked(tmp_path, "wait")


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_pretrained(tiny_run)


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_a_second_writer_of_a_sample_set_is_a_sentence_and_changes_nothing(model, tmp_path, name):
    sampler = Sampler(name="ddim", num_inference_steps=2).resolve(model)
    output, refused = tmp_path / name, []

    def draw_too(*_):
        before = listing(tmp_path)
        with pytest.raises(UserError, match=rf"{name} is in use, process {os.getpid()} .* give another --output"):
            draw_samples(model, sampler, 2, output)
        refused.append(listing(tmp_path) == before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_set, "_print_estimate", draw_too)
        draw_samples(model, sampler, 2, output)
    assert refused == [True] and len(read_samples(output).images) == 2
    assert {path.name for path in tmp_path.rglob("*")} <= {name, "samples.json", "000000.png", "000001.png"}
    draw_samples(model, sampler, 3, output)  # more images for the same set
    assert len(read_samples(output).images) == 3


@pytest.mark.parametrize("named", [True, False])
def test_evaluations_at_the_same_time_write_records_of_their_own(tiny_run, tmp_path, monkeypatch, named, capsys):
    """The second one begins and ends while the first one scores. Both have pictures of pairs."""
    # Other tests may have evaluated the shared run.
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*"))
    words = ["evaluate", run, "--suite=smoke", "--num_images=40", "--num_inference_steps=2", "--metrics=memorization"]
    words += [f"--output={tmp_path / 'run' / 'evaluations' / 'mine.json'}"] * named
    scoring, evaluations = evaluate.score, []

    def score(*arguments):
        evaluations.append(1)
        if len(evaluations) == 1:
            main([*map(str, words)])
        return scoring(*arguments)

    monkeypatch.setattr(evaluate, "score", score)
    main([*map(str, words)])
    said = capsys.readouterr()
    records = sorted((run / "evaluations").glob("*.json"), key=lambda path: path.stem)
    assert len(evaluations) == len(records) == 2 and records[0].stem == records[1].stem.removesuffix("-2")
    assert ("Warning: another evaluation wrote" in said.err) == named
    for record in records:
        extras = [entry.get("extra", {}) for entry in json.loads(record.read_text())["metrics"]]
        assert [extra["sheet"] for extra in extras if "sheet" in extra] == [
            f"{record.stem}.pairs.png"
        ] and f"The record is {record}." in said.out
    assert len(list((run / "evaluations").iterdir())) == 4  # nothing is left over


def test_a_record_is_replaced_only_where_it_was_asked_for(tmp_path):
    path, pairs = tmp_path / "a.json", tmp_path / "pairs.png"
    for k in range(3):
        pairs.write_text(str(k))
        write_new_record({"metrics": [], "number": k}, path, pairs)
    assert write_new_record({"metrics": [], "number": 3}, path, pairs, overwrite=True) == path
    numbers = {file.name: json.loads(file.read_text())["number"] for file in tmp_path.glob("*.json")}
    assert numbers == {"a.json": 3, "a-2.json": 1, "a-3.json": 2}
    assert {file.name: file.read_text() for file in tmp_path.glob("*.png")} == {
        "a-2.pairs.png": "1",
        "a-3.pairs.png": "2",
    }


def test_the_card_and_the_figures_of_a_live_run_are_left_to_it(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    main(["card", str(run)])
    before = (run / "README.md").stat().st_mtime_ns
    with locked(run, "wait"):
        for command in ("card", "figures"):
            with pytest.raises(SystemExit):
                main([command, str(run)])
            assert "is in use" in capsys.readouterr().err
        main(["evaluate", str(run), "--suite=smoke", "--num_images=40", "--metrics=bits_per_dim"])
    assert (run / "README.md").stat().st_mtime_ns == before and list((run / "evaluations").iterdir())


def test_drawing_figures_holds_the_lock(tiny_run, tmp_path, monkeypatch):
    run, writers = shutil.copytree(tiny_run, tmp_path / "run"), []
    monkeypatch.setattr(figures, "figures_of_run", lambda folder, *others: writers.append(writer_of(folder)))
    main(["figures", str(run)])
    assert writers[0].startswith(f"process {os.getpid()}") and writer_of(run) is None


def test_a_lock_that_is_a_link_or_a_pipe_traps_nobody(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("link", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / locks.LOCK).symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe" / locks.LOCK)
    for name in ("link", "pipe"):
        assert writer_of(tmp_path / name) is None
        with pytest.raises(OSError), locked(tmp_path / name, "wait"):
            pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["samples", "figures", "unet", "evaluations", "best", "logs", "metrics.jsonl"])
def test_what_is_in_the_way_of_a_later_file_is_refused_at_the_start(tmp_path, name):
    if "." in name:
        (tmp_path / name).mkdir()
        said = f"has a folder named {name}, where the run writes a file: move it away"
    else:
        (tmp_path / name).write_text("mine")
        said = f"has a file named {name}, where the run writes a folder: move it away"
    with pytest.raises(UserError, match=said):
        find_checkpoint(config(tmp_path, "--overwrite_output_dir", "--logger=tensorboard"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "unet/logs", "checkpoint-3", "README.md"])
def test_a_log_has_a_place_of_its_own(tmp_path, name):
    with pytest.raises(UserError, match=f"--logging_dir {name} is where the run writes other files"):
        find_checkpoint(config(tmp_path / "run", f"--logging_dir={name}"))
