"""Images of any shape, from training to scores: each kind of data is trained on once, for four steps."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, steps, untrained_unet
from diffusers import DDIMPipeline, DDPMPipeline
from kills import assert_equal, everything
from PIL import Image

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.models.build import build_unet
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.sampling.sample_set import read_samples
from ddpm_hf.sizes import read_size, write_size
from ddpm_hf.training.loop import train


NUM_IMAGES = 44  # scores need 40


def rectangles(folder):
    """Write RGB images of 8x12 pixels."""
    random = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / f"{k:02}.png")


def rgba(folder):
    """Write RGBA images of 8x8 pixels, partly transparent."""
    random = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        Image.fromarray(random.integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(folder / f"{k:02}.png")


def bands(folder):
    """Write float arrays of 8x12 pixels with 5 channels, with values from -2 to 6."""
    random = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        np.save(folder / f"{k:02}.npy", random.uniform(-2, 6, (8, 12, 5)).astype(np.float32))


# For each kind of data: a function that writes its files, the flags of the training, and the shape (C, H, W).
FLOATS = ["--resolution=8x12", "--pixel_range=-2,6", "--preserve_input_precision"]
KINDS = {
    "rectangles": (rectangles, ["--resolution=8x12", "--variance_type=learned_range"], (3, 8, 12)),
    "rgba": (rgba, ["--channels=4"], (4, 8, 8)),
    "bands": (bands, FLOATS, (5, 8, 12)),
}


class Run:
    """A finished run of four steps: its folder, its data, its flags and the shape of its images."""

    def __init__(self, kind, root):
        write, flags, self.shape = KINDS[kind]
        self.kind, self.folder, self.data = kind, root / "run", root / "data"
        self.data.mkdir()
        write(self.data)
        self.flags = [*TINY, f"--dataset_name={self.data}", "--max_train_steps=4", "--checkpointing_steps=2"]
        self.flags += ["--ddpm_num_steps=5"]
        self.flags += ["--use_ema", *flags]
        train(parse_config([*self.flags, f"--output_dir={self.folder}"]))


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    return Run(request.param, tmp_path_factory.mktemp(request.param))


def test_a_run_says_its_size_and_resumes_bit_for_bit(run, tmp_path):
    channels, *size = run.shape
    unet = json.loads((run.folder / "unet" / "config.json").read_text())
    assert unet["sample_size"] == (size if size[0] != size[1] else size[0]) and unet["in_channels"] == channels
    flags = json.loads((run.folder / "train_config.json").read_text())["flags"]
    assert flags["resolution"] == write_size(size)
    more = "" if channels == 3 else f" with {channels} channels"
    assert f"of {size[0]}x{size[1]} images{more}" in (run.folder / "README.md").read_text()
    resumed = shutil.copytree(run.folder, tmp_path / "run")
    flags = [f"--output_dir={resumed}", f"--resume_from_checkpoint={resumed / 'checkpoint-2'}"]
    if run.kind == "rectangles":
        train(parse_config([*run.flags, *flags]))
        assert_equal(everything(resumed), everything(run.folder))
        return
    other, _ = steps(2, *run.flags, *flags, "--no_overwrite_output_dir")  # draws no figures, which take seconds
    saved = safetensors.torch.load_file(run.folder / "checkpoint-4" / "ema.safetensors")
    assert other.state.step == 4
    assert_equal(dict(other.ema.state_dict()), saved)


@pytest.mark.parametrize("sampler, stock", [("ddpm", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_stock_diffusers_draws_the_same_images(run, sampler, stock):
    if sampler == "ddim" and "--variance_type=learned_range" in run.flags:
        unet = load_pretrained(run.folder).unet
        assert unet.config.out_channels == 2 * run.shape[0]  # stock DDIM cannot split the output
        return
    pipeline = stock.from_pretrained(run.folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    theirs = pipeline(2, generator=generators, num_inference_steps=5, output_type="np").images
    settings = ddpm_hf.Sampler(name=sampler, num_inference_steps=5).resolve(model := load_pretrained(run.folder))
    ours = settings.draw(model, [0, 1]).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert ours.shape == (2, *run.shape[1:], run.shape[0]) and np.abs(ours - theirs).max() < 1e-5


def test_scores(run, tmp_path):
    flags = dict(metrics=["bits_per_dim", "memorization"], num_images=40, num_inference_steps=2, batch_size=40)
    flags |= dict(bound_images=2, bound_timesteps=2, samples_dir=tmp_path / "drawn", output=tmp_path / "a.json")
    result = ddpm_hf.evaluate(run.folder, **flags)
    assert result.scores["bits_per_dim"] > 0 and result.scores["memorization_exact_copies"] == 0
    assert result.record["data"]["resolution"] == write_size(run.shape[1:])
    assert (tmp_path / "a.pairs.png").exists()


def test_scores_of_networks_that_see_colors_are_refused(run):
    if run.shape[0] == 3:
        return
    with pytest.raises(UserError, match=f"fid needs a network .* these images have {run.shape[0]} channels: leave"):
        ddpm_hf.evaluate(run.folder, metrics=["fid"], num_images=40)


def test_restoring(run, tmp_path):
    """The part that is kept comes back in the values of the input file, and the sheet shows both."""
    mask = np.zeros(run.shape[1:], dtype=np.uint8)
    mask[2:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    suffix = ".npy" if run.kind == "bands" else ".png"
    given, output = run.data / f"00{suffix}", tmp_path / f"restored{suffix}"
    few = ["--task=inpaint", "--num_inference_steps=2", "--num_samples=1", f"--mask={tmp_path / 'mask.png'}"]
    main(["restore", str(run.folder), str(given), str(output), *few])
    before, after = (np.load(path) if suffix == ".npy" else np.array(Image.open(path)) for path in (given, output))
    assert before.dtype == after.dtype and np.allclose(before[mask == 0], after[mask == 0], atol=1e-2)
    assert Image.open(f"{output}.sheet.png").mode == "RGB"
    wrong = ".png" if suffix == ".npy" else ".npy"
    with pytest.raises(
        UserError, match=f"images of {run.shape[0]} channels are written as {suffix[1:]} files: give a"
    ):
        ddpm_hf.restore(run.folder, given, tmp_path / f"a{wrong}", task="denoise")


def test_samples_are_written_in_the_values_of_the_data(run, tmp_path):
    few = dict(num_inference_steps=2, seed=3)
    drawn = ddpm_hf.sample(run.folder, 2, "ddim", **few)
    model = load_pretrained(run.folder)
    exact = ddpm_hf.Sampler(name="ddim", **few).resolve(model).draw(model, [0, 1]).permute(0, 2, 3, 1).numpy()
    folder = ddpm_hf.sample(model, 2, "ddim", output=tmp_path / "drawn", **few)
    file = ddpm_hf.sample(model, 2, "ddim", output=tmp_path / "drawn.npz", **few)
    stored = np.load(file)["arr_0"]
    if run.kind == "bands":
        assert stored.dtype == np.float32 and np.allclose(stored, 4 * exact + 2, atol=1e-5)
        assert np.array_equal(np.load(folder / "000001.npy"), stored[1])
        assert drawn[0].dtype == np.uint8 and drawn[0].shape == (8, 12, 5)
    else:
        assert stored.dtype == np.uint8
        assert np.array_equal(np.array(Image.open(folder / "000001.png")), stored[1])
        assert drawn[0].mode == {3: "RGB", 4: "RGBA"}[run.shape[0]]
    for place in (folder, file):  # as scores read them
        images = read_samples(place).images.permute(0, 2, 3, 1).numpy()
        assert np.array_equal(images, np.stack([np.array(image) for image in drawn]))
    assert ddpm_hf.sample(model, 3, "ddim", output=file, **few) and len(np.load(file)["arr_0"]) == 3
    with pytest.raises(UserError, match="has other samples"):
        ddpm_hf.sample(model, 3, "ddim", output=file, pixel_type="uint16" if run.kind != "bands" else "uint8", **few)


def test_another_size_is_drawn_with_a_warning(run, tmp_path, capsys):
    few = ["--sampler=ddim", "--num_inference_steps=2", "--num_images=2"]
    main(["sample", str(run.folder), "--size=4x16", f"--output={tmp_path / 'drawn'}", *few])
    height, width = run.shape[1:]
    assert f"Warning: this model was trained on {height}x{width} pixels, and --size 4x16" in capsys.readouterr().out
    assert read_samples(tmp_path / "drawn").images.shape == (2, run.shape[0], 4, 16)
    assert json.loads((tmp_path / "drawn" / "samples.json").read_text())["sampler"]["size"] == [4, 16]
    own = ddpm_hf.Sampler(size=(height, width)).resolve(model := load_pretrained(run.folder))
    assert own == ddpm_hf.Sampler().resolve(model) and "size" not in own.record(model)
    with pytest.raises(UserError, match="--size is 4x15, but this model halves both sides 1 times: give multiples"):
        ddpm_hf.sample(model, 1, size="4x15")
    with pytest.raises(UserError, match="a model is scored at the size it was trained on"):
        ddpm_hf.evaluate(run.folder, size="4x16")


def test_sizes():
    assert [read_size(size) for size in (64, "64", " 48X64 ", [48, 64])] == [(64, 64), (64, 64), (48, 64), (48, 64)]
    assert [write_size(size) for size in ((64, 64), (48, 64))] == [64, "48x64"]
    assert TrainingConfig(dataset_name="digits", resolution=(8, 8)).resolution == 8
    for wrong in ("48x", "4x8x3", "6.5", 64.0, True, None, "-8x8", "48x9000", "0x64"):
        with pytest.raises(UserError, match="^--resolution is .*, but must be"):
            TrainingConfig(dataset_name="digits", resolution=wrong)


@pytest.mark.parametrize("given, scaled", [((20, 24), (10, 12)), ((8, 24), (8, 24)), ((30, 12), (30, 12))])
def test_images_are_scaled_to_cover_a_rectangle_and_cropped(given, scaled, tmp_path):
    ramp = np.linspace(0, 255, given[0] * given[1]).reshape(given).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    flags = dict(train_data_dir=str(tmp_path), resolution="8x12")
    (middle, _), (images, _) = (load_images(TrainingConfig(**flags, center_crop=center)) for center in (True, False))
    whole = np.asarray(Image.fromarray(ramp).resize(scaled[::-1], Image.Resampling.LANCZOS))
    top, left = (scaled[0] - 8) // 2, (scaled[1] - 12) // 2
    expected = torch.from_numpy(whole[top : top + 8, left : left + 12].copy())
    assert torch.equal(((middle.get([0])[0, 0] + 1) * 127.5).round().byte(), expected)
    assert images.random_crop == (scaled != (8, 12))
    crops = [images.get([0], [torch.Generator().manual_seed(k)])[0, 0] for k in range(9)]
    corners = {round((crop[0, 0].item() + 1) * 127.5) for crop in crops}
    assert crops[0].shape == (8, 12) and len(corners) > 1 and corners <= set(whole[:-7, :-11].flatten().tolist())


def test_a_crop_that_loses_much_gets_a_hint(tmp_path):
    rectangles(tmp_path)
    hints = [
        [line for line in load_images(TrainingConfig(train_data_dir=str(tmp_path), resolution=size))[0].warnings]
        for size in (64, "8x12", "16x24")
    ]
    assert hints[1:] == [[], []]
    assert hints[0] == [
        "Hint: the crop to 64x64 cuts off 33% of the pixels of the images looked at: --resolution 64x96 (height x "
        "width) would keep more of the pixels."
    ]


def test_every_level_halves_both_sides(tmp_path):
    build = lambda **flags: build_unet(TrainingConfig(dataset_name="x", base_channels=8, **flags), 3)  # noqa: E731
    unet = build(resolution="12x32", channel_mults=[1, 2, 2], attention_resolutions=[6])
    assert unet.config.sample_size == [12, 32]
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert len(build(resolution="12x32").config.block_out_channels) == 3  # 12, 6, 3
    with pytest.raises(UserError, match="--resolution 12x34 cannot be halved 2 times.* sides that are multiples of 4"):
        build(resolution="12x34", channel_mults=[1, 2, 2])
    with pytest.raises(
        UserError,
        match=r"has 8, but the levels of this UNet have sides of \[12, 6\] .* \(the shorter side of each level\)",
    ):
        build(resolution="12x32", channel_mults=[1, 2], attention_resolutions=[8])
    untrained_unet([12, 32], channels=3).save_config(tmp_path)
    config = dict(model_config_name_or_path=str(tmp_path))
    assert build(resolution="12x32", **config).config.sample_size == [12, 32]
    with pytest.raises(UserError, match=r"has sample_size \[12, 32\], but this run needs 32"):
        build(resolution=32, **config)
