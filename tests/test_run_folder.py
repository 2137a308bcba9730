"""What a start may do to a folder: everything that can be refused comes first, and only a run's own files go."""

import json
import shutil

import pytest
from conftest import ROOT, TWO_DIGITS

from ddpm_hf import UserError, files
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.models import build
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training.checkpoints import remove_checkpoint, save_checkpoint
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import build_run, open_run


def config(folder, *flags):
    return parse_config([*TWO_DIGITS, "--max_train_steps=3", f"--output_dir={folder}", *flags])


def listing(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "run"
    train(config(folder, "--checkpointing_steps=1", "--use_ema", "--logger=tensorboard"))
    return folder


@pytest.fixture
def ran(three_steps, tmp_path):
    """A finished run with checkpoints 1, 2 and 3."""
    return shutil.copytree(three_steps, tmp_path / "run")


@pytest.fixture
def own(ran):
    """Files of the user in a run's folder, which look like those of a run but are not."""
    names = ["unet/notes.txt", "unet/config.json.bak", "evaluations/passwords.json", "evaluations/list.json"]
    names += ["evaluations/mine.png", "logs/mine.txt", "logs/ddpm_hf/mine.txt", "best/mine.txt", "figures/reverse.psd"]
    names += ["figures/ddim_mine.png", "samples/epoch_mine.png", "checkpoint-mine.tmp/file", ".push-notes/file"]
    return [write(ran / name, "[]" if "list" in name else '{"password": 1}') for name in names]


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("size", [0, 0.5])
def test_a_damaged_checkpoint_is_refused_before_anything_changes(ran, name, size):
    damaged = ran / "checkpoint-1" / name
    damaged.write_bytes(damaged.read_bytes()[: int(size * damaged.stat().st_size)])
    before = listing(ran)
    with pytest.raises(UserError, match="checkpoint-1 is damaged"):
        open_run(config(ran, "--use_ema", "--resume_from_checkpoint=checkpoint-1"))
    assert listing(ran) == before


@pytest.mark.parametrize("objective", ["simple", "classify"])
def test_a_run_of_an_earlier_version_goes_on_without_the_group_norm_that_it_lacks(tmp_path, objective):
    flags = [*TWO_DIGITS, "--resnet_time_scale_shift=scale_shift", f"--objective={objective}"]
    new = build_run(parse_config([*flags, f"--output_dir={tmp_path}/run"]), None)[0]
    assert new.network.mid_block.attentions[0].group_norm is not None

    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "middle_norm_groups", lambda *_: None)
        old = build_run(new.config, None)[0]
    old.state.step = 1
    network = {"unet": dict(old.network.config), "class_names": None}
    if objective == "classify":
        del network["unet"]["attn_norm_num_groups"]  # earlier classifiers do not have this argument
    save_checkpoint(old, network, [])
    resumed = open_run(parse_config([*flags, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=latest"]))
    assert resumed.network.mid_block.attentions[0].group_norm is None and resumed.state.step == 1
    if objective == "simple":
        assert load_pretrained(checkpoint).unet.mid_block.attentions[0].group_norm is None


def test_a_tracker_that_cannot_start_leaves_the_run_that_was_to_be_overwritten(ran):
    write(ran / "own" / "a file")
    before = listing(ran)
    with pytest.raises(UserError, match="--logger tensorboard cannot start"):
        train(config(ran, "--overwrite_output_dir", "--logger=tensorboard", "--logging_dir=own/a file"))
    assert listing(ran) == before


RECORDS = ["{}", "[]", "text", '{"flags": {}}', '{"flags": []}', '{"learning_rate": 1}']
RECORDS += ['{"flags": {"output_dir": ".", "resolution": 8}, "versions": {}}']


@pytest.mark.parametrize("record", RECORDS)
def test_a_folder_of_another_program_is_refused_and_loses_nothing(tmp_path, record):
    folder = tmp_path / "theirs"
    names = ["unet/config.json", "classifier/config.json", "evaluations/a.json", "logs/ddpm_hf/events.out.tfevents.1"]
    for name in [*names, "metrics.jsonl", "samples/epoch_0001.png", "figures/loss.png", "checkpoint-7.tmp/file"]:
        write(folder / name)
    write(folder / "train_config.json", record)
    before = listing(folder)
    with pytest.raises(UserError, match="is not empty"):
        train(config(folder, "--resume_from_checkpoint=latest"))
    assert listing(folder) == before
    open_run(config(folder, "--overwrite_output_dir"))
    assert listing(folder).keys() == before.keys()  # train_config.json is replaced, and nothing is removed


def test_a_checkpoint_in_a_folder_of_no_run_is_not_overwritten(tmp_path):
    write(tmp_path / "checkpoint-2" / "weights.txt")
    before = listing(tmp_path)
    with pytest.raises(UserError, match="has a checkpoint-2, but no train_config.json of a run"):
        train(config(tmp_path, "--overwrite_output_dir"))
    assert listing(tmp_path) == before


def test_overwriting_removes_exactly_what_the_run_wrote(ran, own):
    record = (ROOT / "tests/fixtures/run_5c3000a/run/evaluations/finished.json").read_text()
    write(ran / "evaluations" / "fid.json", record)
    write(ran / "evaluations" / "fid.pairs.png")
    write(ran / "checkpoint-2.tmp" / "state.pt")
    write(ran / ".push-a1b2c3d4" / "file")
    open_run(config(ran, "--overwrite_output_dir"))
    kept = {ran / "train_config.json", ran / "README.md", *own}
    assert {path for path in ran.rglob("*") if path.is_file()} == kept
    assert not (ran / "scheduler").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_resuming_removes_what_the_abandoned_steps_wrote(ran, own, step):
    record = (ROOT / "tests/fixtures/run_5c3000a/run/evaluations/finished.json").read_text()
    # By the step that wrote it. The sheet of the first epoch is from the end of the run.
    later = {ran / "samples" / "epoch_0001.png": 3, write(ran / "samples" / "epoch_0002.png"): 40}
    for number in (1, 2, 3):
        later[write(ran / "evaluations" / f"step_{number:07d}.json", record)] = number
        later[write(ran / "evaluations" / f"step_{number:07d}.pairs.png")] = number
    later[write(ran / "best" / "best.json", '{"step": 2}')] = 2
    for name in ("model_index.json", "unet/config.json"):
        later[write(ran / "best" / name)] = 2
    kept = [write(ran / "evaluations" / "fid.json", record), write(ran / "evaluations" / "step_0000009.json", "{}")]
    run = open_run(config(ran, "--use_ema", f"--resume_from_checkpoint=checkpoint-{step}"))
    assert {path for path in later if path.exists()} == {path for path, number in later.items() if number <= step}
    assert all(path.exists() for path in [*own, *kept]) and run.state.step == step


def test_an_earlier_version_that_does_not_say_how_long_an_epoch_is_keeps_its_sheets_and_its_best(ran):
    record = ran / "checkpoint-1" / "train_config.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "facts"}))
    (ran / "checkpoint-1" / "manifest.json").unlink()
    kept = [write(ran / "samples" / "epoch_0040.png"), write(ran / "best" / "model_index.json")]
    open_run(config(ran, "--use_ema", "--resume_from_checkpoint=checkpoint-1"))
    assert all(path.exists() for path in kept)


def test_the_name_of_the_logging_dir_is_taken_literally(ran, own):
    open_run(config(ran, "--overwrite_output_dir", "--logging_dir=*"))
    assert all(path.exists() for path in own)


def test_the_folder_of_the_tracker_may_be_a_link_out_of_the_run(ran, tmp_path):
    shutil.move(ran / "logs", tmp_path / "logs")
    (ran / "logs").symlink_to(tmp_path / "logs")
    before = listing(tmp_path / "logs")
    assert before
    open_run(config(ran, "--overwrite_output_dir"))
    assert listing(tmp_path / "logs") == before


def test_the_new_logs_of_an_overwritten_run_are_kept(ran):
    old = set(listing(ran / "logs"))
    train(config(ran, "--overwrite_output_dir", "--logger=tensorboard"))
    new = set(listing(ran / "logs"))
    assert any("tfevents" in path.name for path in new) and not old & new


def test_a_run_killed_before_its_record_is_started_again(tmp_path):
    write(tmp_path / "run" / "logs" / "ddpm_hf" / "events.out.tfevents.1")
    write(tmp_path / "run" / ".writable.tmp")
    assert train(config(tmp_path / "run", "--resume_from_checkpoint=latest")).finished


def test_a_finished_classifier_without_checkpoints_is_not_started_again(tmp_path):
    folder = tmp_path / "run"
    train(config(folder, "--objective=classify"))
    remove_checkpoint(folder / "checkpoint-3")
    before = listing(folder)
    with pytest.raises(UserError, match="is not empty"):
        train(config(folder, "--objective=classify", "--resume_from_checkpoint=latest"))
    assert listing(folder) == before


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(ran, monkeypatch):
    def killed(folder):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):  # resuming from an earlier checkpoint removes the later ones
        open_run(config(ran, "--use_ema", "--resume_from_checkpoint=checkpoint-1"))
    monkeypatch.undo()
    assert [path.name for path in checkpoints(ran)] == ["checkpoint-1", "checkpoint-2"]
    run = open_run(config(ran, "--use_ema", "--resume_from_checkpoint=latest"))
    assert run.state.step == 2 and not list(ran.glob("*.tmp"))


def test_part_of_a_checkpoint_is_not_listed_and_not_in_the_way(ran):
    (ran / "checkpoint-3" / "model.safetensors").unlink()  # as earlier versions left it after a kill
    assert [path.name for path in checkpoints(ran)] == ["checkpoint-1", "checkpoint-2"]
    assert train(config(ran, "--use_ema", "--resume_from_checkpoint=latest")).finished
    assert (ran / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize("pipeline", [True, False])
def test_latest_does_not_start_again_over_incomplete_checkpoints(ran, pipeline):
    for checkpoint in checkpoints(ran):
        (checkpoint / "optimizer.bin").unlink()
    if not pipeline:  # as a run leaves it that was killed before its first pipeline
        shutil.rmtree(ran / "unet")
        (ran / "model_index.json").unlink()
    before = listing(ran)
    wanted = "found no complete checkpoint in .*, but an incomplete checkpoint-3: give --overwrite_output_dir instead"
    with pytest.raises(UserError, match=wanted):
        train(config(ran, "--use_ema", "--resume_from_checkpoint=latest"))
    assert listing(ran) == before


def test_a_damaged_later_checkpoint_is_kept_under_another_name(tmp_path, capsys):
    flags = [*TWO_DIGITS, "--checkpointing_steps=2", f"--output_dir={tmp_path / 'run'}"]
    train(parse_config([*flags, "--max_train_steps=4"]))
    (tmp_path / "run" / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "thesis.txt").write_text("mine")
    capsys.readouterr()
    train(parse_config([*flags, "--max_train_steps=4", "--resume_from_checkpoint=latest"]))
    said = capsys.readouterr().out
    assert "Resuming from" in said and "so it was renamed to checkpoint-4.damaged." in said
    assert (tmp_path / "run" / "checkpoint-4.damaged" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint-9.damaged" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "run" / "checkpoint-4" / "state.pt").is_file()
