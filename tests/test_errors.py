"""Bad input of a user gives one sentence on stderr, exit code 2, no traceback, and no files."""

import re

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import TINY
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.processes import check_processes
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import open_run
from train_unconditional import main


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folders that cannot be trained on, and a finished run."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "readme.txt").write_text("no images here")
    (root / "damaged" / "a").mkdir(parents=True)
    pixels = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for k in range(20):
        pixels.save(root / "damaged" / "a" / f"{k}.png")
    data = (root / "damaged" / "a" / "7.png").read_bytes()
    (root / "damaged" / "a" / "7.png").write_bytes(data[: len(data) // 2])
    (root / "flat").mkdir()
    for k in range(10):
        pixels.save(root / "flat" / f"{k}.png")
    (root / "numbers").mkdir()
    datasets.Dataset.from_dict({"x": [1.0, 2.0]}).to_parquet(root / "numbers" / "train-00000-of-00001.parquet")
    (root / "file").write_text("a file")
    (root / "config.json").write_text('{"_class_name": "DDPMScheduler"}')
    (root / "list.json").write_text("[]")
    sizes = '"sample_size": 8, "in_channels": 1, "out_channels": 1'
    (root / "classes.json").write_text("{" + sizes + ', "num_class_embeds": 10}')
    (root / "checkpoint-3").mkdir()
    (root / "checkpoint-4").mkdir()
    for name in ("state.pt", "train_config.json"):
        (root / "checkpoint-4" / name).write_text("{")
    (root / "backup").mkdir()
    (root / "backup" / "state.pt").touch()
    (root / "mine" / "samples").mkdir(parents=True)
    (root / "mine" / "samples" / "holiday.jpg").touch()
    train(parse_config([*TINY, "--max_train_steps=2", f"--output_dir={root / 'run'}"]))
    (root / "run" / "samples" / "mine").mkdir()
    pixels.save(root / "run" / "samples" / "mine" / "1.png")
    return root


CLASSLESS = [*TINY[1:], "--train_data_dir={root}/flat"]
BAD = {
    # flags
    "nothing to train on": ([], "nothing to train on"),
    "unknown preset": (["--preset=mnst"], "there is no preset 'mnst': did you mean mnist?"),
    "unknown flag": (["--preset=mnist", "--bach_size=3"], "there is no flag '--bach_size': did you mean"),
    "no number": ([*TINY, "--train_batch_size=lots"], "invalid int value: 'lots'"),
    "zero batch": ([*TINY, "--train_batch_size=0"], "--train_batch_size is 0"),
    "negative steps": ([*TINY, "--max_train_steps=-1"], "--max_train_steps is -1"),
    "zero epochs": ([*TINY, "--num_epochs=0"], "--num_epochs is 0"),
    "negative seed": ([*TINY, "--seed=-1"], "--seed is -1"),
    "huge seed": ([*TINY, "--seed=99999999999999999999"], "--seed is 99999999999999999999, but must be at most"),
    "endless betas": ([*TINY, "--ddpm_num_steps=1000000000000"], "--ddpm_num_steps is 1000000000000, but must be at"),
    "infinite rate": ([*TINY, "--learning_rate=inf"], "--learning_rate is inf, but must be a finite number"),
    "nan epsilon": ([*TINY, "--adam_epsilon=nan"], "--adam_epsilon is nan, but must be a finite number"),
    "rate below the last of polynomial": (
        [*TINY, "--lr_scheduler=polynomial", "--learning_rate=0"],
        "polynomial cannot",
    ),
    "unknown loss": ([*TINY, "--loss_type=l9"], "there is no --loss_type 'l9': choose from"),
    "unknown betas": ([*TINY, "--ddpm_beta_schedule=cosine"], "'cosine': did you mean nichol_cosine?"),
    "too few steps for ho": ([*TINY, "--ddpm_beta_schedule=ho_linear"], "take at least 21 timesteps"),
    "more steps than T": ([*TINY, "--ddpm_num_inference_steps=11"], "--ddpm_num_inference_steps is 11"),
    "unknown lr schedule": ([*TINY, "--lr_scheduler=wave"], "--lr_scheduler wave is not known: choose from linear"),
    "mistyped lr schedule": ([*TINY, "--lr_scheduler=cosin"], "cosin is not known: did you mean cosine?"),
    "snapshots of augmented images": (
        [*TINY, "--ema_snapshots=4", "--augment_probability=0.1"],
        "--ema_snapshots cannot be averaged after a training with --augment_probability: leave one of the two out",
    ),
    "hybrid of a fixed variance": ([*TINY, "--objective=hybrid"], "--objective hybrid trains a learned variance"),
    "simple with a learned one": (
        [*TINY, "--objective=simple", "--variance_type=learned_range"],
        "--objective simple cannot train --variance_type learned_range: give --objective hybrid or vlb",
    ),
    "weighted bound": ([*TINY, "--objective=vlb", "--snr_gamma=5"], "--objective vlb cannot be combined with"),
    "bound of another distance": (
        [*TINY, "--objective=vlb", "--loss_type=l1"],
        "--objective vlb cannot be combined with",
    ),
    "unknown objective": ([*TINY, "--objective=elbo"], "--objective elbo is not known: choose from simple, hybrid"),
    "fp16 on a CPU": ([*TINY, "--mixed_precision=fp16"], "--mixed_precision fp16 is not possible here"),
    "tracker not installed": ([*TINY, "--logger=wandb"], "--logger wandb is not installed: pip install wandb"),
    "best of nothing": ([*TINY, "--save_best"], "--save_best needs held-out images"),
    # the model
    "resolution cannot be halved": ([*TINY, "--resolution=7"], "--resolution 7 cannot be halved 1 times"),
    "attention nowhere": ([*TINY, "--attention_resolutions=16"], "--attention_resolutions has 16, but the levels"),
    "no such config": ([*TINY, "--model_config_name_or_path=nowhere/x"], "'nowhere/x' has no UNet2DModel config"),
    "config of another class": ([*TINY, "--model_config_name_or_path={root}/config.json"], "holds DDPMScheduler"),
    "config of no class": ([*TINY, "--model_config_name_or_path={root}/list.json"], "holds JSON of another shape"),
    "config with classes": (
        [*TINY, "--model_config_name_or_path={root}/classes.json"],
        "has num_class_embeds 10, but",
    ),
    "classes of none": ([*CLASSLESS, "--class_conditional"], "--class_conditional needs images with classes"),
    "a classifier of none": ([*CLASSLESS, "--objective=classify"], "--objective classify needs images with classes"),
    "a conditional classifier": (
        [*TINY, "--objective=classify", "--class_conditional"],
        "classify cannot use --class_conditional",
    ),
    "all labels dropped": ([*TINY, "--label_dropout=1"], "--label_dropout is 1.0, but must lie between 0 and 1"),
    # the data
    "no such folder": (["--dataset_name=./nowhere"], "nowhere"),
    "no such hub dataset": (["--dataset_name=nobody/nothing"], "nobody/nothing"),
    "no such data dir": (["--train_data_dir={root}/nowhere"], "nowhere"),
    "empty folder": (["--train_data_dir={root}/empty"], "empty"),
    "folder without images": (["--train_data_dir={root}/texts"], "texts"),
    "dataset without images": (["--dataset_name={root}/numbers"], "image"),
    "damaged image": (["--train_data_dir={root}/damaged", "--train_batch_size=2"], "7.png"),
    "no such column": (["--dataset_name={images}", "--image_column=img"], "--image_column"),
    "column of another type": (["--dataset_name={images}", "--image_column=label"], "--image_column"),
    "no such label column": (["--dataset_name={images}", "--label_column=breed"], "--label_column"),
    "no such class": (["--dataset_name={images}", "--class_names=horse"], "cat"),
    "no such split": (["--dataset_name={images}", "--validation_split=tset"], "--validation_split"),
    "share above one": (["--dataset_name={images}", "--validation_split=1.5"], "--validation_split"),
    "training images held out": (["--dataset_name={images}", "--validation_split=train"], "names the training images"),
    "all held out": (["--dataset_name={images}", "--validation_split=12"], "--validation_split"),
    "batch larger than the set": (["--dataset_name={images}", "--train_batch_size=13"], "there are only 12"),
    # the folder
    "images in the folder of the run": (
        ["--train_data_dir={images}", "--output_dir={images}", "--overwrite_output_dir"],
        "would put the files of the run where its images are looked for",
    ),
    "images in the samples of the run": (
        ["--dataset_name={root}/run/samples/mine", "--output_dir={root}/run", "--resume_from_checkpoint=latest"],
        "would put the files of the run where its images are looked for",
    ),
    "a Hub id as the name of the run": (
        ["--dataset_name=me/cats", "--output_dir=me/cats"],
        "would put the files of the run where its images are looked for (me/cats)",
    ),
    "folder in use": ([*TINY, "--output_dir={root}/run"], "is not empty: give --resume_from_checkpoint latest"),
    "folder is a file": ([*TINY, "--output_dir={root}/file"], "is a file"),
    "folder with too long a name": ([*TINY, "--output_dir=" + "a" * 300], "could not be written to aaa"),
    "folder below a file": ([*TINY, "--output_dir={root}/file/run"], "could not be written"),
    "tracker's folder elsewhere": ([*TINY, "--logging_dir={root}"], "is not inside --output_dir: give a name"),
    "tracker's folder above": ([*TINY, "--logging_dir=../logs"], "is not inside --output_dir: give a name"),
    "folder with a name that is not UTF-8": ([*TINY, "--output_dir=runs/caf\udce9"], "is in a path that is not UTF-8"),
    "no name of a folder": ([*TINY, "--output_dir="], "--output_dir is empty"),
    "latest in a folder of the user's": (
        [*TINY, "--output_dir={root}/mine", "--resume_from_checkpoint=latest"],
        "is not empty: give",
    ),
    "checkpoint of another process": (
        [*TINY, "--output_dir={root}/run", "--resume_from_checkpoint=latest", "--prediction_type=v_prediction"],
        "was trained with --prediction_type epsilon, not v_prediction",
    ),
    "checkpoint past the end": (
        [*TINY, "--output_dir={root}/run", "--resume_from_checkpoint=latest", "--max_train_steps=1"],
        "is past the 1 steps of this run",
    ),
    "checkpoint by another name": (
        [*TINY, "--resume_from_checkpoint={root}/backup"],
        "give a folder named checkpoint-",
    ),
    "damaged checkpoint": ([*TINY, "--resume_from_checkpoint={root}/checkpoint-4"], "is not a complete checkpoint"),
    "checkpoint of another folder into a full one": (
        [*TINY, "--output_dir={root}/mine", "--resume_from_checkpoint={root}/run/checkpoint-2"],
        "is from another run folder",
    ),
    "no such checkpoint": ([*TINY, "--resume_from_checkpoint={root}/checkpoint-9"], "is not a complete checkpoint"),
    "half a checkpoint": ([*TINY, "--resume_from_checkpoint={root}/checkpoint-3"], "is not a complete checkpoint"),
    "checkpoint of another model": (
        [*TINY, "--output_dir={root}/run", "--resume_from_checkpoint=latest", "--base_channels=16"],
        "is of another model (block_out_channels is [8, 16] in the checkpoint, but [16, 32] in this run)",
    ),
    "checkpoint without ema": (
        [*TINY, "--output_dir={root}/run", "--resume_from_checkpoint=latest", "--use_ema"],
        "was trained without --use_ema",
    ),
}


def listing(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, broken, image_folder, tmp_path, capsys):
    argv, sentence = BAD[name]
    argv = [flag.format(root=broken, images=image_folder) for flag in argv]
    if not any(flag.startswith("--output_dir") for flag in argv):
        argv.append(f"--output_dir={tmp_path / 'run'}")
    if not any(flag.startswith(("--resolution", "--preset")) for flag in argv):
        argv += ["--resolution=16", "--base_channels=8", "--logger=none"]
    if not any(flag.startswith(("--max_train_steps", "--num_epochs")) for flag in argv):
        argv.append("--max_train_steps=3")  # should a refusal fail, the test does not train for hours
    before = listing(broken)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("train_unconditional.py: error: ")]
    assert len(sentences) == 1 and sentence in sentences[0], error
    assert re.search(r"[.?]$", sentences[0]) or "invalid" in sentences[0]
    assert "Traceback" not in error
    assert listing(broken) == before and not (tmp_path / "run").exists()


def test_there_are_more_than_25_cases():
    assert len(BAD) >= 25


def test_a_read_only_folder_is_a_sentence(tmp_path, capsys, monkeypatch):
    # Root may write anywhere, so the folder lies where nobody can: below a device.
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, "--output_dir=/dev/null/run"])
    assert stopped.value.code == 2 and "could not be written to /dev/null/run" in capsys.readouterr().err


def test_a_checkpoint_outlives_every_refusal(broken):
    assert [path.name for path in checkpoints(broken / "run")] == ["checkpoint-2"]


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")  # then torchrun's processes are no group on a CPU
    with pytest.raises(UserError, match="2 processes were launched without a GPU each: set ACCELERATE_USE_CPU=true"):
        open_run(parse_config([*TINY, f"--output_dir={tmp_path}/run"]))
    assert not (tmp_path / "run").exists()


def test_models_split_among_processes_are_refused(monkeypatch):
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"sharded models \(FSDP\) are not supported"):
        check_processes()
