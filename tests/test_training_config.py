"""Flags: the 45 of diffusers' example with its types and defaults; default < preset < command line; errors."""

import dataclasses
import doctest
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS
from ddpm_hf.config.training_config import TrainingConfig


# Name, type and default as in examples/unconditional_image_generation/train_unconditional.py of diffusers 58eb52c.
UPSTREAM = {
    "dataset_name": (str, None), "dataset_config_name": (str, None), "model_config_name_or_path": (str, None),
    "train_data_dir": (str, None), "output_dir": (str, "ddpm-model-64"), "overwrite_output_dir": (bool, False),
    "cache_dir": (str, None), "resolution": (int, 64), "center_crop": (bool, False), "random_flip": (bool, False),
    "train_batch_size": (int, 16), "eval_batch_size": (int, 16), "dataloader_num_workers": (int, 0),
    "num_epochs": (int, 100), "save_images_epochs": (int, 10), "save_model_epochs": (int, 10),
    "gradient_accumulation_steps": (int, 1), "learning_rate": (float, 1e-4), "lr_scheduler": (str, "cosine"),
    "lr_warmup_steps": (int, 500), "adam_beta1": (float, 0.95), "adam_beta2": (float, 0.999),
    "adam_weight_decay": (float, 1e-6), "adam_epsilon": (float, 1e-8), "use_ema": (bool, False),
    "ema_inv_gamma": (float, 1.0), "ema_power": (float, 0.75), "ema_max_decay": (float, 0.9999),
    "push_to_hub": (bool, False), "hub_token": (str, None), "hub_model_id": (str, None),
    "hub_private_repo": (bool, False), "logger": (str, "tensorboard"), "logging_dir": (str, "logs"),
    "local_rank": (int, -1), "mixed_precision": (str, "no"), "prediction_type": (str, "epsilon"),
    "ddpm_num_steps": (int, 1000), "ddpm_num_inference_steps": (int, 1000), "ddpm_beta_schedule": (str, "linear"),
    "checkpointing_steps": (int, 500), "checkpoints_total_limit": (int, None), "resume_from_checkpoint": (str, None),
    "enable_xformers_memory_efficient_attention": (bool, False), "preserve_input_precision": (bool, False),
}  # fmt: skip


def test_all_45_flags_of_upstream_are_there_with_its_defaults():
    assert len(UPSTREAM) == 45
    config = parse_config(["--dataset_name=digits"])
    for name, (_, default) in UPSTREAM.items():
        assert getattr(config, name) == (default if name != "dataset_name" else "digits")


@pytest.mark.parametrize("name", UPSTREAM)
def test_flag_of_upstream_takes_a_value_of_its_type(name):
    kind, _ = UPSTREAM[name]
    # Values that differ from every default and stay within what a run can have.
    special = {
        "logger": "none",
        "mixed_precision": "bf16",
        "prediction_type": "sample",
        "ddpm_num_inference_steps": "7",
    }
    value = special.get(name, {str: "word", int: "1007", float: "0.25", bool: None}[kind])
    argv = ["--dataset_name=digits", f"--{name}" if value is None else f"--{name}={value}"]
    read = getattr(parse_config(argv), name)
    assert type(read) is kind and read == (True if value is None else kind(value))
    assert getattr(parse_config([a.replace(name, name.replace("_", "-")) for a in argv]), name) == read


BOOLEANS = [field.name for field in dataclasses.fields(TrainingConfig) if field.type is bool]


@pytest.mark.parametrize("name", BOOLEANS)
def test_every_boolean_can_be_negated(name):
    start = ["--dataset_name=digits", "--validation_split=test", "--prediction_type=v_prediction", f"--{name}"]
    assert getattr(parse_config(start), name) is True
    for no in ([f"--no_{name}"], [f"--no-{name.replace('_', '-')}"], [f"--{name}", "false"], [f"--{name}=False"]):
        assert getattr(parse_config(start + no), name) is False


def test_preset_beats_default_and_flag_beats_preset():
    assert parse_config(["--preset=cifar10"]).train_batch_size == 128
    assert parse_config(["--preset=cifar10", "--train_batch_size=3"]).train_batch_size == 3
    assert parse_config(["--train_batch_size=3", "--preset=cifar10"]).train_batch_size == 3
    assert parse_config(["--preset=cifar10", "--no_use_ema"]).use_ema is False
    # A flag that repeats the default wins over the preset too.
    assert parse_config(["--preset=cifar10", "--learning_rate=1e-4"]).learning_rate == 1e-4


def test_epochs_on_the_command_line_win_over_the_steps_of_a_preset():
    assert parse_config(["--preset=cifar10"]).max_train_steps == 800_000
    config = parse_config(["--preset=cifar10", "--num_epochs=3"])
    assert config.max_train_steps is None and config.num_epochs == 3
    assert parse_config(["--preset=cifar10", "--num_epochs=3", "--max_train_steps=5"]).max_train_steps == 5


@pytest.mark.parametrize("words", [["1,2,2"], ["1", "2", "2"], ["1", "2,2"]])
def test_lists_may_be_written_with_commas_or_blanks(words):
    assert parse_config(["--preset=mnist", "--channel_mults", *words]).channel_mults == [1, 2, 2]


@pytest.mark.parametrize("words", [["--attention_resolutions"], ["--attention_resolutions", ""]])
def test_no_attention_is_an_empty_list(words):
    assert parse_config(["--preset=mnist", *words]).attention_resolutions == []


BOUNDED = ["max_train_steps", "num_epochs", "lr_warmup_steps", "eval_batch_size", "dataloader_num_workers"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "nothing to train on"),
        (["--preset=cifar"], "there is no preset 'cifar': did you mean cifar10?"),
        (["--preset=mnist", "--lerning_rate=1"], "there is no flag '--lerning_rate': did you mean --learning_rate?"),
        (["--preset=mnist", "stray"], "there is no flag 'stray': see --help"),
        (["--preset=mnist", "--train_batch_size=0"], "--train_batch_size is 0, but must be at least 1"),
        (["--preset=mnist", "--train_batch_size=many"], "invalid int value: 'many'"),
        (["--preset=mnist", "--max_train_steps=-5"], "--max_train_steps is -5, but must be at least 1"),
        (["--preset=mnist", "--learning_rate=-1"], "--learning_rate is -1.0, but must be at least 0"),
        (["--preset=mnist", "--learning_rate=nan"], "--learning_rate is nan"),
        (["--preset=mnist", "--dropout=1.5"], "--dropout is 1.5, but must lie between 0 and 1"),
        (["--preset=mnist", "--ema_max_decay=1"], "--ema_max_decay is 1.0"),
        (["--preset=mnist", f"--seed={10**400}"], "but must be at most 4294967295: give a smaller number"),
        *((["--preset=mnist", f"--{name}={10**20}"], f"is {10**20}, but must be at most") for name in BOUNDED),
        (["--preset=mnist", "--freq_shift=2"], "--freq_shift is 2, but must be at most 1"),
        (["--preset=mnist", "--norm_eps=0"], "--norm_eps is 0.0, but must be positive, e.g. 1e-5."),
        (["--preset=mnist", "--snr_gamma=0"], "--snr_gamma is 0.0, but must be positive"),
        (["--preset=mnist", "--loss_type=l3"], "there is no --loss_type 'l3': choose from l2, l1, huber."),
        (["--preset=mnist", "--use_ema=maybe"], "Truthy value expected"),
        (["--preset=mnist", "--pixel_range=4095"], "--pixel_range is 4095, but must be two numbers"),
        (["--preset=mnist", "--pixel_range=9,9"], "--pixel_range is 9,9, but must be two numbers"),
        (["--preset=mnist", "--pixel_range=0,nan"], "--pixel_range is 0,nan, but must be two numbers"),
        (["--preset=mnist", "--pixel_range=0,x"], "is not a list of numbers: write --pixel_range=0,4095"),
        (["--preset=mnist", "--on_bad_image=skip", "--streaming"], "--on_bad_image skip reads all images before"),
        (["--preset=mnist", "--on_bad_image=ignore"], "there is no --on_bad_image 'ignore': choose from refuse, skip"),
        (["--preset=mnist", "--channels=0"], "--channels is 0, but must be at least 1"),
        (["--preset=mnist", "--channel_mults=1,x"], "is not a list of whole numbers: write --channel_mults 1,2,2,2"),
        (["--preset=mnist", "--ddpm_num_steps=10"], "--ddpm_num_inference_steps is 100, but must"),
        (["--preset=mnist", "--validation_split", "", "--save_best"], "--save_best needs held-out images"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_exit_code_2(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_in_python_a_bad_value_is_a_value_error():
    with pytest.raises(UserError, match="--num_epochs is 0"):
        TrainingConfig(dataset_name="digits", num_epochs=0)
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_in_python_and_on_the_command_line(name):
    assert TrainingConfig.from_preset(name) == parse_config([f"--preset={name}"])
    given = TrainingConfig.from_preset(name, seed=7, num_epochs=3, validation_split=None, save_best=False)
    assert (given.seed, given.num_epochs, given.max_train_steps, given.validation_split) == (7, 3, None, None)
    assert given.base_channels == PRESETS[name].flags["base_channels"] and given.preset == name


def test_without_a_preset_there_are_the_defaults_and_the_flags():
    assert TrainingConfig.from_preset(None, dataset_name="x", seed=3) == TrainingConfig(dataset_name="x", seed=3)
    assert TrainingConfig.from_preset("cifar10", num_epochs=2, max_train_steps=9).max_train_steps == 9
    assert TrainingConfig.from_preset("cifar10", max_train_steps=None).max_train_steps is None


def test_lists_and_paths_may_be_pythons_own(tmp_path):
    one = TrainingConfig(dataset_name=tmp_path, class_names="cat", channel_mults=(1, 2), attention_resolutions="16, 8")
    assert (one.class_names, one.channel_mults, one.attention_resolutions) == (["cat"], [1, 2], [16, 8])
    assert one.dataset_name == str(tmp_path)
    assert TrainingConfig(**json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("preset", "flags", "sentence"),
    [
        ("mnist_cpu", {}, "there is no preset 'mnist_cpu': did you mean mnist-cpu"),
        ("zebra", {}, "there is no preset 'zebra': choose from digits, [^(]*$"),
        ("mnist", {"lerning_rate": 1e-3}, "there is no flag 'lerning_rate': did you mean learning_rate?"),
        (None, {"zebra": 1}, "there is no flag 'zebra': see --help"),
        ("mnist", {"train_batch_size": "8"}, "--train_batch_size is '8', but must be a whole number"),
        ("mnist", {"train_batch_size": 8.5}, "--train_batch_size is 8.5, but must be a whole number"),
        ("mnist", {"train_batch_size": None}, "--train_batch_size is None, but must be a whole number"),
        ("mnist", {"train_batch_size": True}, "--train_batch_size is True, but must be a whole number"),
        ("mnist", {"learning_rate": "fast"}, "--learning_rate is 'fast', but must be a number"),
        ("mnist", {"use_ema": "no"}, "--use_ema is 'no', but must be true or false"),
        ("mnist", {"loss_type": "l3"}, "--loss_type is 'l3', but must be l2 or l1 or huber"),
        ("mnist", {"loss_type": ["l2"]}, "--loss_type is .*, but must be l2 or l1 or huber"),
        ("mnist", {"validation_split": 0.1}, "--validation_split is 0.1, but must be text"),
        ("mnist", {"class_names": 3}, "--class_names is 3, but must be a list"),
        ("mnist", {"num_epochs": 0}, "--num_epochs is 0, but must be at least 1"),
    ],
)
def test_what_no_run_can_have_is_one_sentence_in_python_too(preset, flags, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        TrainingConfig.from_preset(preset, **flags)
    assert "\n" not in str(error.value)


def outside(bounds):
    """Return a value just outside each of a field's bounds."""
    values = [bounds[name] + step for name, step in {"at_least": -1, "at_most": 1}.items() if name in bounds]
    return values + [1.0, -0.1] * ("fraction" in bounds) + [0.0] * ("positive" in bounds)


BOUNDED = [(field.name, value) for field in dataclasses.fields(TrainingConfig) for value in outside(field.metadata)]


@pytest.mark.parametrize(("name", "value"), BOUNDED)
def test_values_outside_the_bounds_of_their_field_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} is {value}, but must (be|lie) "):
        TrainingConfig(dataset_name="digits", **{name: value})


def test_all_numbers_have_bounds():
    numbers = {
        field.name
        for field in dataclasses.fields(TrainingConfig)
        if field.type in (int, float, int | None, float | None) and field.name != "local_rank"
    }
    assert numbers == {name for name, _ in BOUNDED}


def test_the_examples_in_the_docstrings_are_true():
    done = doctest.testmod(sys.modules[TrainingConfig.__module__])
    assert done.attempted >= 2 and done.failed == 0


def test_the_token_is_not_in_the_record():
    assert "hf_secret" not in str(parse_config(["--preset=mnist", "--hub_token=hf_secret"]).to_dict())


def test_help_is_quick_and_grouped():
    before = os.times()
    done = subprocess.run(
        [sys.executable, ROOT / "train_unconditional.py", "--help"], capture_output=True, text=True, check=True
    )
    after = os.times()
    # Its own seconds, not the clock's: these pass as fast beside other tests.
    assert sum(after[2:4]) - sum(before[2:4]) < 2
    for group in ("recipe:", "data:", "model:", "diffusion:", "optimisation:", "output:", "hub:"):
        assert f"\n{group}\n" in done.stdout
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name}" in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_a_complete_run(name):
    config = parse_config([f"--preset={name}"])
    assert config.dataset_name and config.output_dir == f"runs/{name}"
