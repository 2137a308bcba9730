"""A checkpoint is what its run saved, or it is refused; and a resumed run says what has changed."""

import contextlib
import json
import pickle
import shutil

import pytest
import torch
from conftest import TWO_DIGITS

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.manifest import MANIFEST
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training.batches_ahead import draw_batches
from ddpm_hf.training.checkpoints import check_same_run, load_checkpoint, save_checkpoint
from ddpm_hf.training.loop import step, train
from ddpm_hf.training.resume_changes import DECIDE, FIXED, FREE, facts_to_compare
from ddpm_hf.training.run import open_run


RUN = [*TWO_DIGITS, "--max_train_steps=3", "--checkpointing_steps=1", "--use_ema", "--validation_split=0.1"]


def config(folder, *flags):
    return parse_config([*RUN, f"--output_dir={folder}", *flags])


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "run"
    train(config(folder))
    return folder


@pytest.fixture
def ran(three_steps, tmp_path):
    """A finished run with checkpoints 1, 2 and 3."""
    return shutil.copytree(three_steps, tmp_path / "run")


def open_at(folder, name, *flags):
    """Open the run at a checkpoint and let it go again; return the Run."""
    run = open_run(config(folder, f"--resume_from_checkpoint={name}", *flags))
    run.lock.close()
    return run


def change_json(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def change_state(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


class Foreign:
    """What `weights_only` does not load."""


# What may be wrong with a checkpoint that has no manifest.
DAMAGES = {
    "empty optimizer": lambda c: (c / "optimizer.bin").write_bytes(b""),
    "optimizer of another program": lambda c: (c / "optimizer.bin").write_bytes(pickle.dumps(Foreign())),
    "cut average": lambda c: (c / "ema.safetensors").write_bytes((c / "ema.safetensors").read_bytes()[:-100]),
    "config is a list": lambda c: (c / "train_config.json").write_text("[]"),
    "config is empty": lambda c: (c / "train_config.json").write_text("{}"),
    "flags are a list": lambda c: change_json(c / "train_config.json", lambda r: r.update(flags=[1])),
    "state of another program": lambda c: (c / "state.pt").write_bytes(pickle.dumps(Foreign())),
    "state is a list": lambda c: torch.save([], c / "state.pt"),
    "counter missing": lambda c: change_state(c / "state.pt", lambda s: s.pop("seconds")),
    "counter is a text": lambda c: change_state(c / "state.pt", lambda s: s.update(images_seen="8")),
    "losses of another shape": lambda c: change_state(c / "state.pt", lambda s: s.update(pending=[torch.zeros(2)])),
}


def test_every_damaged_checkpoint_is_one_sentence(ran):
    run = open_at(ran, "checkpoint-3")
    for manifest in (True, False):  # checkpoints of earlier versions have none
        for name, damage in DAMAGES.items():
            checkpoint = ran / "checkpoint-2"
            saved = shutil.copytree(checkpoint, ran / "saved")
            if not manifest:
                (checkpoint / MANIFEST).unlink()
            damage(checkpoint)
            with pytest.raises(UserError, match=r"checkpoint-2 is damaged \(.+\): remove it and take an") as error:
                check_same_run(checkpoint, run)
                load_checkpoint(run, checkpoint)
            assert "\n" not in str(error.value), name
            shutil.rmtree(checkpoint)
            saved.rename(checkpoint)


def test_weights_of_another_checkpoint_are_noticed(ran):
    shutil.copy(ran / "checkpoint-1" / "model.safetensors", ran / "checkpoint-3" / "model.safetensors")
    for read in (lambda: open_at(ran, "latest"), lambda: load_pretrained(ran / "checkpoint-3", weights="raw")):
        with pytest.raises(UserError, match="model.safetensors has another hash than the file that was saved"):
            read()


@pytest.mark.parametrize("manifest", [True, False])
def test_a_renamed_checkpoint_is_noticed(ran, manifest):
    if not manifest:
        (ran / "checkpoint-2" / MANIFEST).unlink()
    (ran / "checkpoint-2").rename(ran / "checkpoint-11")
    with pytest.raises(UserError, match="checkpoint-11 holds step 2: rename it to checkpoint-2"):
        open_at(ran, "latest", "--max_train_steps=20")
    assert (ran / "checkpoint-11" / "state.pt").exists()


@pytest.mark.parametrize("name", [MANIFEST, "random_states_0.pkl", "ema.safetensors", "optimizer.bin"])
def test_part_of_a_checkpoint_is_not_listed(ran, name):
    path = ran / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:10])
    assert [path.name for path in checkpoints(ran)] == ["checkpoint-1", "checkpoint-2"]
    assert open_at(ran, "latest").state.step == 2


@pytest.mark.parametrize("content", ["{}", "[]", '{"step": 2, "files": {"../model": {"size": 1, "sha256": ""}}}'])
def test_a_foreign_manifest_is_one_sentence(ran, content):
    (ran / "checkpoint-2" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=MANIFEST):
        open_at(ran, "checkpoint-2")


def test_checkpoints_of_earlier_and_later_versions_are_resumed(ran):
    (ran / "checkpoint-2" / MANIFEST).unlink()
    change_json(
        ran / "checkpoint-2" / "train_config.json", lambda r: [r["flags"].pop("variance_type"), r.pop("facts")] and r
    )
    change_state(ran / "checkpoint-2" / "state.pt", lambda state: state.update(another_counter=1))
    assert open_at(ran, "checkpoint-2").state.step == 2


@pytest.mark.parametrize("name", ["train_config.json", "ema.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"flags": {}}', b"\xff" * 100])
def test_a_damaged_checkpoint_is_no_model(ran, name, content):
    for manifest in (True, False):
        if not manifest:
            (ran / "checkpoint-3" / MANIFEST).unlink()
        (ran / "checkpoint-3" / name).write_bytes(content)
        with pytest.raises(UserError, match="checkpoint-3"):
            load_pretrained(ran / "checkpoint-3")


# What a resumed run says about flags.


def test_the_same_flags_are_resumed_without_a_warning(ran, capsys):
    free = [
        "--logging_steps=7",
        "--save_images_epochs=3",
        "--base_channels=8",
        "--eval_batch_size=1",
    ]
    open_at(ran, "checkpoint-2", *free)
    said = capsys.readouterr().out
    assert f"Resuming from {ran / 'checkpoint-2'} (step 2 of 3)." in said and "Warning: th" not in said
    assert f"Removing what this run replaces in {ran}: checkpoint-3, 1 other file. Your own files there stay." in said


CHANGES = {
    "--seed=5": "seed 0 -> 5", "--max_grad_norm=2": "max_grad_norm 1.0 -> 2.0",
    "--adam_beta1=0.5": "adam_beta1 0.95 -> 0.5",
    "--lr_warmup_steps=1": "lr_warmup_steps 2 -> 1", "--ema_power=0.5": "ema_power 0.75 -> 0.5",
    "--validation_split=0.2": "validation_split 0.1 -> 0.2", "--center_crop": "center_crop False -> True",
    "--no_use_ema": "use_ema True -> False", "--train_batch_size=4": "global_batch_size 8 -> 4",
    "--class_names=3": "num_images 326 -> ", "--max_train_steps=9": "total_steps 3 -> 9",
    "--label_dropout=0.3": "label_dropout 0.1 -> 0.3",
}  # fmt: skip


def test_every_flag_that_changed_is_named(ran, capsys):
    open_at(ran, "checkpoint-2", *CHANGES)
    said = capsys.readouterr().out
    assert not [change for change in CHANGES.values() if change not in said], said
    free = FREE | set(FIXED) | set().union(*DECIDE.values())
    named = {flag.strip("-").removeprefix("no_").split("=")[0] for flag in CHANGES}
    assert named & free == {"max_train_steps"}


def test_images_added_to_the_folder_are_noticed(image_folder, tmp_path, capsys):
    data, folder = shutil.copytree(image_folder, tmp_path / "data"), tmp_path / "run"
    flags = [*TWO_DIGITS, f"--output_dir={folder}", "--dataset_name=", "--class_names="]
    flags += ["--checkpointing_steps=1"]
    train(parse_config([*flags, f"--train_data_dir={data}", "--max_train_steps=1"]))
    moved, changed = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(data, tmp_path / "changed")
    shutil.copy(image_folder / "cat" / "0.png", changed / "cat" / "new.png")
    said = []
    for place in (moved, changed):
        capsys.readouterr()
        more = [f"--train_data_dir={place}", "--resume_from_checkpoint=latest", "--max_train_steps=1"]
        open_run(parse_config([*flags, *more])).lock.close()
        said.append(capsys.readouterr().out)
    assert "Warning: these settings" not in said[0]  # the same images in another place
    assert "num_images 12 -> 13" in said[1] and "data_fingerprint" in said[1] and "train_data_dir" in said[1]


@pytest.mark.parametrize("flag", ["--class_conditional", "--balance_classes", "--random_flip"])
def test_other_labels_of_the_same_images_are_noticed_by_a_run_that_uses_them(image_folder, tmp_path, capsys, flag):
    paths = sorted(image_folder.rglob("*.png"))
    said = []
    for turn in range(2):
        data = tmp_path / f"data{turn}"
        data.mkdir()
        labels = [["a", "b"][(k + turn) % 2] for k in range(len(paths))]
        for k, path in enumerate(paths):
            shutil.copy(path, data / f"{k:02}.png")
        text = "".join(f"{k:02}.png,{label}\n" for k, label in enumerate(labels))
        (data / "metadata.csv").write_text(f"file_name,label\n{text}")
        flags = [*TWO_DIGITS, f"--output_dir={tmp_path / 'run'}", "--dataset_name=", "--class_names=", flag]
        flags += [f"--train_data_dir={data}", "--max_train_steps=1", "--resume_from_checkpoint=latest"]
        run = open_run(parse_config(flags))
        said.append(capsys.readouterr().out)
        run.lock.close()
        if turn == 0:
            run.state.step = 1
            facts = {"unet": dict(run.network.config), "facts": facts_to_compare(run, 1)}
            save_checkpoint(run, facts, [])
    assert ("labels_fingerprint" in said[1]) == (flag != "--random_flip") and "Resuming" in said[1]
    assert "data_fingerprint" not in said[1]


def test_a_jump_of_the_learning_rate_is_told(ran, capsys):
    open_at(ran, "checkpoint-2", "--lr_warmup_steps=1", "--max_train_steps=100")
    said = capsys.readouterr().out
    assert "the learning rate was 0.0005 in step 2 and is 0.001 in the next one, because its schedule" in said


def test_the_flags_of_adam_act_after_a_resume(ran):
    flags = ["--adam_beta1=0.5", "--adam_beta2=0.9", "--adam_weight_decay=0.3", "--adam_epsilon=0.1"]
    (group,) = open_at(ran, "checkpoint-2", *flags).optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.9), 0.3, 0.1)
    assert json.loads((ran / "train_config.json").read_text())["flags"]["adam_beta1"] == 0.5


def test_epochs_are_counted_by_images_after_a_change_of_the_batch(ran):
    run = open_at(ran, "checkpoint-3", "--train_batch_size=4", "--max_train_steps=200")  # three steps of 8 images
    assert run.num_images == 326 and [run.epochs(3 + k) for k in (0, 75, 76, 156, 157)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("folder", ["run", "new"])
@pytest.mark.parametrize("best", [True, False])
def test_the_best_score_is_that_of_a_model_in_this_folder(ran, tmp_path, folder, best):
    checkpoint = ran / "checkpoint-2"
    (checkpoint / MANIFEST).unlink()
    change_state(checkpoint / "state.pt", lambda state: state.update(best_score=0.5, best_measure="validation_loss"))
    if best:
        (ran / "best").mkdir()
        (ran / "best" / "model_index.json").write_text("{}")
    run = open_at(tmp_path / folder, checkpoint, "--save_best")
    assert run.state.best_score == (0.5 if best and folder == "run" else float("inf"))


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_has_whole_batches_after_a_change_of_the_accumulation(ran, monkeypatch, batch, accumulation):
    flags = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"]
    run = open_at(ran, "checkpoint-1", *flags)  # one step of one micro-batch was taken
    counted = [run.accelerator.step]
    take, synced = run.optimizer.step, []
    monkeypatch.setattr(run.optimizer, "step", lambda: [synced.append(run.accelerator.sync_gradients), take()])
    run.model.train()
    with contextlib.closing(draw_batches(run)) as batches:
        step(run, batches)
    assert synced == [False] * (accumulation - 1) + [True] and counted == [accumulation]


@pytest.mark.parametrize("name", ["latest", "checkpoint-2"])
def test_to_resume_and_to_overwrite_is_one_sentence(ran, name):
    with pytest.raises(
        UserError, match="--resume_from_checkpoint goes on with a run and --overwrite_output_dir removes"
    ):
        open_at(ran, name, "--overwrite_output_dir")
    assert len(checkpoints(ran)) == 3
