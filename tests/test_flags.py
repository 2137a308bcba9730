"""Every flag has an effect: on training, on the images, on the files, or as an error."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import numpy as np
import processes
import pytest
import torch
from accelerate.utils import DynamoBackend
from conftest import TINY, TWO_DIGITS, steps
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import UserError
from ddpm_hf.__main__ import parse
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.batches import training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.pictures import to_uint8
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training.loop import seconds_per_step, train
from ddpm_hf.training.run import check_run, make_accelerator, open_run


# Flags that change the trajectory: the weights after four steps differ from those of the same run without them.
TRAJECTORY = [
    "--seed=1", "--resolution=16", "--base_channels=16", "--channel_mults=1,1", "--layers_per_block=2",
    "--attention_resolutions=8,4", "--attention_head_dim=4", "--norm_num_groups=2", "--norm_eps=0.1",
    "--resnet_time_scale_shift=scale_shift", "--flip_sin_to_cos=false", "--freq_shift=1", "--downsample_padding=0",
    "--dropout=0.5", "--ddpm_num_steps=20", "--ddpm_beta_schedule=squaredcos_cap_v2",
    "--prediction_type=sample", "--prediction_type=v_prediction", "--variance_type=learned_range", "--loss_type=l1",
    "--loss_type=huber", "--snr_gamma=5", "--train_batch_size=4", "--gradient_accumulation_steps=2",
    "--num_epochs=1", "--max_train_steps=7", "--learning_rate=1e-2", "--lr_scheduler=constant", "--lr_warmup_steps=0",
    "--adam_beta1=0.5", "--adam_beta2=0.5", "--adam_weight_decay=0.5", "--adam_epsilon=0.1", "--max_grad_norm=0.01",
    "--mixed_precision=bf16", "--random_flip", "--class_names=3,8", "--validation_split=0.5", "--objective=vlb",
    "--timestep_sampling=loss_second_moment", "--class_conditional", "--objective=classify",
    "--balance_classes", "--augment_probability=0.5",
]  # fmt: skip


# Two of the ten digits, because these are decoded five times as fast as all.
TWO = "--class_names=3,7"


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run, _ = steps(4, TWO, "--output_dir", tmp_path_factory.mktemp("plain"))
    return weights(run)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return steps(4, TWO, "--output_dir", tmp_path_factory.mktemp("averaged"), "--use_ema")[0]


def test_the_same_flags_give_the_same_weights_and_the_average_is_beside_them(plain, averaged, tmp_path):
    raw, _ = steps(4, TWO, "--output_dir", tmp_path)
    assert torch.equal(weights(raw), plain) and torch.equal(weights(averaged), plain)
    assert raw.published is raw.network and averaged.published is not averaged.network


@pytest.mark.parametrize("flag", TRAJECTORY)
def test_flag_changes_what_is_learnt(flag, plain, tmp_path):
    changed = weights(steps(4, TWO, "--output_dir", tmp_path, flag)[0])
    assert changed.shape != plain.shape or not torch.equal(changed, plain)


def test_a_learned_variance_is_taught_by_the_objective_asked_for(tmp_path):
    learned = ["--output_dir", tmp_path, "--variance_type=learned_range"]
    default, hybrid, bound = (
        weights(steps(4, TWO, *learned, *flags)[0]) for flags in ([], ["--objective=hybrid"], ["--objective=vlb"])
    )
    assert torch.equal(default, hybrid) and not torch.equal(default, bound)


def test_label_dropout_decides_how_often_the_class_is_told(tmp_path):
    never, seldom, often = (
        steps(4, "--output_dir", tmp_path, "--class_conditional", f"--label_dropout={share}")[0].network
        for share in (0.0, 0.1, 0.9)
    )
    assert len(never.class_embedding.weight) == 10 and len(often.class_embedding.weight) == 11
    assert not torch.equal(seldom.conv_in.weight, often.conv_in.weight)


@pytest.mark.parametrize("flag", ["--ema_inv_gamma=9", "--ema_power=0.2", "--ema_max_decay=0.1"])
def test_ema_flags_change_what_is_published(flag, plain, averaged, tmp_path):
    changed, _ = steps(4, TWO, "--output_dir", tmp_path, "--use_ema", flag)
    assert torch.equal(weights(changed), plain)  # the average is beside the training, never in it
    one, other = averaged.published.state_dict(), changed.published.state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], averaged.network.state_dict()[name]) for name in one)


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """A dataset with two image and two label columns, not square, 16 bit deep in one of them."""
    import datasets

    folder, random = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)

    def picture(k, mode):
        values = random.integers(0, 2**16 if mode == "I;16" else 256, (12, 20), dtype=np.uint16)
        path = folder / f"{mode[0]}{k}.png"
        (Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.astype(np.uint8))).save(path)
        return {"bytes": path.read_bytes(), "path": None}

    features = datasets.Features(
        first=datasets.Image(),
        second=datasets.Image(),
        label=datasets.ClassLabel(names=["a", "b"]),
        other=datasets.ClassLabel(names=["x", "y", "z"]),
    )
    rows = [
        {"first": picture(k, "L"), "second": picture(k, "I;16"), "label": k % 2, "other": k % 3} for k in range(12)
    ]
    (folder / "hub").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    return folder / "hub"


def first_images(folder, *flags):
    config = parse_config([f"--dataset_name={folder}", "--resolution=8", *flags])
    images, _ = load_images(config)
    mirrored = torch.ones(4, dtype=torch.bool) if config.random_flip else None
    return images, images.get(range(4), [torch.Generator().manual_seed(k) for k in range(4)], mirrored)


@pytest.mark.parametrize(
    "flag",
    ["--image_column=second", "--center_crop", "--random_flip", "--class_names=b", "--resolution=4", "--channels=3"],
)
def test_data_flags_change_the_images(odd_images, flag):
    _, plain = first_images(odd_images)
    _, changed = first_images(odd_images, flag)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


def test_preserve_input_precision_keeps_16_bits(odd_images):
    _, rounded = first_images(odd_images, "--image_column=second", "--center_crop")
    _, exact = first_images(odd_images, "--image_column=second", "--center_crop", "--preserve_input_precision")
    levels = (rounded + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert not torch.allclose((exact + 1) * 127.5, ((exact + 1) * 127.5).round(), atol=1e-3)
    assert (exact - rounded).abs().max() < 0.05  # rounding, and clamping between the two passes


def test_pixel_range_says_which_values_are_black_and_white(odd_images):
    flags = ["--image_column=second", "--center_crop", "--preserve_input_precision"]
    _, plain = first_images(odd_images, *flags)
    _, wide = first_images(odd_images, *flags, "--pixel_range=-65535,131070")  # 65535 becomes 2/3 of the scale
    assert torch.allclose(3 * wide, plain, atol=1e-5)


def test_label_column_changes_the_classes(odd_images):
    assert first_images(odd_images)[0].class_names == ["a", "b"]
    assert first_images(odd_images, "--label_column=other")[0].class_names == ["x", "y", "z"]


def test_workers_decode_and_change_no_image(odd_images):
    flags = ["--dataset_name", odd_images, "--max_train_steps=3", "--train_batch_size=2"]
    one = steps(3, *flags, "--output_dir", odd_images.parent / "one")
    two = steps(3, *flags, "--output_dir", odd_images.parent / "two", "--dataloader_num_workers=1")
    assert torch.equal(weights(one[0]), weights(two[0]))


def test_streaming_reads_a_stream(image_folder):
    config = parse_config([f"--dataset_name={image_folder}", "--streaming", "--resolution=8"])
    assert type(load_images(config)[0]).__name__ == "StreamedSet"


def test_train_data_dir_cache_dir_and_config_name(image_folder, tmp_path):
    config = parse_config([f"--train_data_dir={image_folder}", f"--cache_dir={tmp_path}", "--resolution=8"])
    images, _ = load_images(config)
    assert images.num_images == 12 and images.class_names == ["cat", "dog"]
    files = [{"bytes": path.read_bytes(), "path": None} for path in image_folder.rglob("*.png")]
    datasets.Dataset.from_dict({"image": files}).to_parquet(tmp_path / "table" / "train.parquet")
    flags = [f"--dataset_name={tmp_path / 'table'}", f"--cache_dir={tmp_path / 'cache'}", "--resolution=8"]
    assert load_images(parse_config(flags))[0].num_images == 12
    assert any((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(UserError, match="--dataset_config_name elsewhere does not exist"):
        load_images(parse_config([f"--dataset_name={image_folder}", "--dataset_config_name=elsewhere"]))


@pytest.mark.parametrize(
    ("command", "word", "name"),
    [
        ("train", "--output_dir=~/x", "output_dir"),
        ("train", "--dataset_name=~/x", "dataset_name"),
        ("train", "--cache_dir=~/x", "cache_dir"),
        ("train", "--resume_from_checkpoint=~/x", "resume_from_checkpoint"),
        ("train", "--model_config_name_or_path=~/x", "model_config_name_or_path"),
        ("sample", "--output=~/x", "output"),
        ("evaluate", "--samples_dir=~/x", "samples_dir"),
        ("evaluate", "~/x", "subject"),
        ("card", "~/x", "run"),
    ],
)
def test_a_tilde_is_the_home_folder(command, word, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    more = {"train": ["--preset=digits"], "sample": ["model"]}.get(command, [])
    arguments = parse([command, *more, word])
    assert getattr(arguments.config if command == "train" else arguments, name) == "/home/me/x"
    assert TrainingConfig(dataset_name="digits", output_dir="~/x").output_dir == "/home/me/x"
    assert TrainingConfig(dataset_name="digits", output_dir="a~b").output_dir == "a~b"


def finished(folder, *flags):
    train(parse_config([*TINY, "--max_train_steps=4", f"--output_dir={folder}", *flags]))
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("ran"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_output_flags_change_the_folder(ran, tmp_path):
    # An epoch is 45 steps of 40 images, so "every epoch" is the end only, unless the set is small.
    small = ["--class_names=3", "--validation_split=167", "--max_train_steps=4"]  # 16 images: two steps an epoch
    folder = finished(
        tmp_path / "run",
        *small,
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=3",
        "--save_images_epochs=1",
        "--save_model_epochs=1",
        "--eval_batch_size=5",
        "--validation_epochs=1",
        "--save_best",
        "--logging_steps=1",
        "--logger=tensorboard",
        "--logging_dir=trace",
        "--use_ema",
        "--ddpm_num_inference_steps=3",
    )
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [path.name for path in checkpoints(ran)] == ["checkpoint-4"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    assert (folder / "best" / "model_index.json").exists() and not (ran / "best").exists()
    assert any((folder / "trace").rglob("events.out.tfevents.*")) and not (ran / "logs").exists()
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4] and [l["step"] for l in lines(ran)] == [3, 4]
    assert [line["step"] for line in lines(folder) if "validation_loss_ema" in line] == [2, 4]
    sizes = [Image.open(next((run / "samples").glob("*.png"))).size for run in (ran, folder)]
    assert sizes[0] != sizes[1]  # two images, five images


def test_the_sheets_step_count_changes_the_sheet(ran, tmp_path):
    other = finished(tmp_path / "run", "--ddpm_num_inference_steps=10")
    one, two = (np.asarray(Image.open(run / "samples" / "epoch_0001.png")) for run in (ran, other))
    assert not np.array_equal(one, two)
    same = [load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (ran, other)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_overwrite_replaces_the_run_and_nothing_else_and_says_so_first(tmp_path, capsys):
    folder = finished(tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "draft.tmp").touch()
    (folder / "samples" / "epoch_0009.png").touch()
    (folder / "samples" / "holiday.jpg").touch()
    (folder / "README.md").write_text("my own words")
    assert "Removing" not in capsys.readouterr().out
    finished(folder, "--overwrite_output_dir", "--max_train_steps=2")
    said = rf"Removing what this run replaces in {folder}: checkpoint-4, \d+ other files. Your own files there stay."
    assert re.search(said, capsys.readouterr().out)
    assert (folder / "samples" / "holiday.jpg").exists() and (folder / "README.md").read_text() == "my own words"
    assert (folder / "draft.tmp").exists()
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "samples" / "epoch_0009.png").exists()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "flags, share",
    [
        (["--lr_warmup_steps=500"], "all"),
        (["--lr_warmup_steps=51"], "most"),
        (["--lr_warmup_steps=50"], None),
        (["--lr_warmup_steps=500", "--lr_scheduler=constant"], None),
    ],
)
def test_a_warm_up_of_more_than_half_of_the_run_is_mentioned(flags, share, tmp_path, capsys):
    check_run(parse_config([*TWO_DIGITS, "--max_train_steps=100", f"--output_dir={tmp_path / 'run'}", *flags]))
    said = capsys.readouterr().out
    assert ("Warning: --lr_warmup_steps" in said) == (share is not None)
    assert share is None or f" takes {share} of the 100 steps" in said and "give e.g. --lr_warmup_steps 10." in said


@pytest.mark.parametrize("streams", [False, True])
def test_dry_run_says_what_it_would_take_and_shows_the_images_but_makes_no_run(
    tmp_path, capsys, image_folder, streams
):
    flags = ["--random_flip", "--validation_split=0.1"]
    if streams:
        flags = [f"--dataset_name={image_folder}", "--streaming", "--max_train_steps=9", "--verbose"]
    config = parse_config([*TINY, "--dry_run", f"--output_dir={tmp_path / 'run'}", *flags])
    assert train(config) is None
    said = capsys.readouterr().out
    what = (
        "a stream of images of 8x8x3 (0 held out), 2 classes, "
        if streams
        else "1,617 images of 8x8x1 (180 held out), 10 classes, "
    )
    for line in (
        re.escape(what) + r"0.0 M parameters, [\d,]+ steps of 8 images",
        r"Disk: .*: up to \d+ checkpoints of \d+ kB each, one every 500 steps, and \d+ kB for the model",
        r"Time: \S+ s a step, .* for \S+ steps.*: until about \d\d:\d\d on \w+day, \d\d \w+\.",
        r"Memory: \S+ [MG]B\.",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE), said
    assert ('"learning_rate": 0.001' in said) == streams
    assert [path.name for path in tmp_path.iterdir()] == ["run.dry_run.png"]
    picture = np.asarray(Image.open(tmp_path / "run.dry_run.png"))
    picture = picture[32:, -(16 * 132 - 4) :]  # without its labels: five rows of 16 images, and 4 pixels between them
    assert picture.shape[0] == 5 * 132 - 4
    images = to_uint8(next(training_batches(load_images(config, None)[0], config, 0, 0, 1))["images"])
    for k in (0, 7):  # each pixel is a square of 16x16
        shown = picture[:128:16, 132 * k : 132 * k + 128 : 16].reshape(8, 8, -1)
        assert np.array_equal(shown, images[k].permute(1, 2, 0).numpy())


def test_torch_compile_asks_accelerate_for_inductor(tmp_path):
    # Compiling takes minutes on a CPU, so check only that the flag reaches accelerate.
    config = parse_config([*TINY, f"--output_dir={tmp_path}", "--torch_compile"])
    assert make_accelerator(config).state.dynamo_plugin.backend == DynamoBackend.INDUCTOR


@pytest.mark.parametrize("flag,wanted", [("--cudnn_benchmark", True), ("--no_cudnn_benchmark", False)])
def test_cudnn_measures_its_kernels_in_steps_only(tmp_path, flag, wanted):
    run, seen = open_run(parse_config([*TINY, f"--output_dir={tmp_path}", "--max_train_steps=2", flag])), []

    def loss(model, batch):
        seen.append(torch.backends.cudnn.benchmark)
        return run.loss(model, batch)

    with run.lock:
        seconds_per_step(dataclasses.replace(run, loss=loss))
    assert set(seen) == {wanted} and not torch.backends.cudnn.benchmark


def test_local_rank_joins_the_processes_of_an_old_launcher(tmp_path):
    flags, log = [*TINY, "--dry_run", f"--output_dir={tmp_path / 'run'}"], tmp_path / "log"
    children = [
        processes.start(log, *flags, f"--local_rank={k}", environment=place)
        for k, place in enumerate(processes.rendezvous(2))
    ]
    assert processes.ended(children, log).count("on 2 x cpu") == 1


# Where the other flags are tested: hub flags over HTTP in test_hub.py, the rest by name.
ELSEWHERE = {
    "preset": "test_training_config", "dataset_name": "everywhere", "resume_from_checkpoint": "test_resume",
    "init_from": "test_init_from", "ema_snapshots": "test_post_hoc_ema", "rescale_betas_zero_snr": "test_zero_snr",
    "model_config_name_or_path": "test_build", "enable_xformers_memory_efficient_attention": "test_build",
    "push_to_hub": "test_hub", "hub_token": "test_hub", "hub_model_id": "test_hub", "hub_private_repo": "test_hub",
    "eval_metrics": "test_scoring", "eval_epochs": "test_scoring", "eval_num_images": "test_scoring",
    "eval_inception": "test_scoring", "best_by": "test_scoring", "on_bad_image": "test_pixels",
    "pages": "test_pixels",
}  # fmt: skip


def test_no_flag_is_forgotten():
    here = Path(__file__).read_text()
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name}" in here or field.name in ELSEWHERE, field.name
