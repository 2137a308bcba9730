"""Figures: their pixels, all files of a run, and no incomplete files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import TrainingConfig, UserError
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.pretrained import Pretrained
from ddpm_hf.pictures import image_sheet, to_uint8
from ddpm_hf.sampling.samplers import draw, image_generators
from ddpm_hf.training import figures


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine a second thread makes so small a UNet ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[8])
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)


@pytest.fixture(scope="module")
def scheduler():
    return PaperDDPMScheduler.nichol_cosine(10)


def metrics(path, lines, **more):
    """Write a metrics.jsonl such as training leaves, with validation on the last line only."""
    line = dict(epoch=0, images_seen=8, loss=0.5, loss_by_band=[0.9, None, 0.3, 0.1], lr=1e-4, grad_norm=1.0)
    text = [json.dumps(line | {"step": k + 1} | (more if k == lines - 1 else {})) for k in range(lines)]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.mark.parametrize("channels, side, cell", [(1, 8, 128), (1, 28, 112), (3, 32, 128), (3, 256, 256)])
def test_sheet_keeps_every_pixel_as_a_square(tmp_path, channels, side, cell):
    images = torch.randint(0, 256, (4, channels, side, side), dtype=torch.uint8)
    picture = Image.open(image_sheet(images, tmp_path / "sheet.png"))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert picture.size == (2 * cell + 4, 2 * cell + 4)
    pixels = np.asarray(picture).reshape(2 * cell + 4, 2 * cell + 4, channels)
    assert (pixels[cell : cell + 4] == 255).all()
    factor = cell // side
    for corner in (0, factor - 1):  # image 3 is at the bottom right
        last = pixels[cell + 4 + corner :: factor, cell + 4 + corner :: factor]
        assert (last == images[3].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (3, 3), (7, 3), (8, 4), (10, 5), (16, 4), (64, 8)])
def test_sheet_is_nearly_square(count, columns):
    assert figures.near_square(count) == columns


def test_a_failed_write_leaves_the_old_picture(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_text("old")

    def fail(partial, format):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="a picture could not be written to .*sheet.png"):
        figures.save_picture(fail, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("lines", [1, 3, 200])
@pytest.mark.parametrize("more", [{}, {"validation_loss": 0.4, "validation_loss_ema": 0.3}])
def test_loss_figure_takes_any_run(tmp_path, lines, more):
    path = figures.loss_figure(metrics(tmp_path / "metrics.jsonl", lines, **more), tmp_path / "loss.png")
    assert Image.open(path).size == (1320, 600)


@pytest.mark.parametrize(
    "zero",
    [
        {"loss": 0.0},
        {"loss": 0.0, "validation_loss": 0.0},
        {"loss_by_band": [0.9, 0.0, None, 0.1]},
        {"loss": None, "loss_by_band": [None] * 4},
    ],
)
@pytest.mark.parametrize("lines", [1, 3])
def test_loss_figure_takes_losses_of_zero_and_lines_without_a_loss(tmp_path, lines, zero):
    path = figures.loss_figure(metrics(tmp_path / "metrics.jsonl", lines, **zero), tmp_path / "loss.png")
    assert Image.open(path).size == (1320, 600)


def test_the_moving_mean_keeps_a_straight_line_and_ends_on_a_mean_of_the_last_values():
    line = np.arange(300.0)
    assert np.allclose(figures.smooth(line)[:-5], line[:-5])
    assert figures.smooth(line)[-1] == line[-6:].mean()


@pytest.mark.parametrize("T", [10, 1000])
def test_schedule_figure(tmp_path, T):
    schedulers = [PaperDDPMScheduler.nichol_cosine(T), PaperDDPMScheduler(num_train_timesteps=T)]
    for k, scheduler in enumerate(schedulers):
        assert Image.open(figures.schedule_figure(scheduler, tmp_path / f"{k}.png")).size == (1320, 432)


def test_forward_strip_goes_from_the_image_to_noise(tmp_path, scheduler):
    images = torch.zeros(2, 1, 8, 8)
    path = figures.forward_strip(scheduler, images, tmp_path / "forward.png", seed=3)
    pixels = np.asarray(Image.open(path)).astype(float)
    columns = [pixels[32:160, k * 132 : k * 132 + 128] for k in range(9)]  # T=10: t = 0, 1, 2, 3, 5, 6, 7, 8, 9
    spread = [column.std() for column in columns]
    assert pixels.shape == (32 + 128 + 4 + 128, 9 * 132 - 4)
    assert spread == sorted(spread) and spread[0] < 25 and abs(columns[-1].std() - columns[-2].std()) < 5
    again = figures.forward_strip(scheduler, images, tmp_path / "again.png", seed=3)
    assert again.read_bytes() == path.read_bytes()


def test_gif_of_28_px_images_loops_rests_and_is_small(tmp_path):
    T = PaperDDPMScheduler.nichol_cosine(1000)
    noise = torch.Generator().manual_seed(0)
    digits = -torch.ones(20, 1, 28, 28)
    digits[:, :, 4:24, 12:16] = 1
    times = torch.arange(999, -1, -10)
    frames = [T.q_sample(digits, torch.randn(digits.shape, generator=noise), t.expand(20)) for t in times] + [digits]
    path = figures.reverse_gif(frames, tmp_path / "reverse.gif")
    assert path.stat().st_size < 1.5e6
    gif = Image.open(path)
    assert (gif.n_frames, gif.info["loop"], gif.info["duration"], gif.size) == (40, 0, 100, (348, 348))
    gif.seek(39)
    assert gif.info["duration"] == 2000
    last = np.asarray(gif.convert("L"))
    assert (last == np.asarray(figures.tile(figures.resize(to_uint8(digits[:16]), 84), 4))).all()


def test_the_ddim_sheet_has_a_labelled_row_for_each_number_of_steps(tmp_path, unet, scheduler):
    model = Pretrained(unet, scheduler, {}, {}, tmp_path)
    path = figures.ddim_sheet(model, tmp_path / "ddim.png", seed=5, num_images=2)
    picture = np.asarray(Image.open(path))
    assert figures.ddim_steps(10) == [5, 10] and figures.ddim_steps(30) == [5, 10, 20, 30]
    left = picture.shape[1] - (2 * 128 + 4)
    assert picture.shape[0] == 32 + 2 * 128 + 4 and left > 100
    for row, count in enumerate((5, 10)):
        options = dict(sampler="ddim", num_inference_steps=count, spacing="trailing")
        images = to_uint8(draw(unet, scheduler, image_generators(5, range(2)), **options))
        top = 32 + row * 132
        assert (picture[top : top + 128, left:] == np.asarray(figures.tile(figures.resize(images, 128), 2))).all()
        assert picture[top : top + 128, :left].min() < 50  # the label
    many = Image.open(figures.ddim_sheet(model, tmp_path / "many.png", seed=5, num_images=16))
    assert many.width == left + 8 * 132 - 4


def drawn_by(monkeypatch, function, *arguments):
    """Return the matplotlib figure that a function of `figures` saved."""
    kept = []
    monkeypatch.setattr(figures, "save_picture", lambda write, path: kept.append(write.__self__))
    function(*arguments)
    return kept[0]


def contrast(color, other="#ffffff"):
    """Return the contrast ratio of two colors, as WCAG 2.2 defines it."""
    channels = [[int(each[k : k + 2], 16) / 255 for k in (1, 3, 5)] for each in (color, other)]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in each] for each in channels]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


def test_every_axis_says_what_it_shows_on_an_opaque_background(tmp_path, scheduler, monkeypatch):
    lines = metrics(tmp_path / "metrics.jsonl", 3, validation_loss=0.4)
    for arguments in [(figures.loss_figure, lines, "loss.png"), (figures.schedule_figure, scheduler, "schedule.png")]:
        figure = drawn_by(monkeypatch, *arguments)
        assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") for ax in figure.axes)
        assert figure.get_facecolor()[3] == 1  # dark text on white is readable in a dark page too
    assert all(contrast(color) >= 3 for color in figures.BANDS.values())


class Zeros:
    """A training set of grey images."""

    num_images = 2

    def get(self, indices):
        return torch.zeros(len(indices), 1, 8, 8)


def draw_figures(folder, unet, scheduler, **flags):
    config = TrainingConfig(dataset_name="digits", ddpm_num_steps=10, **flags)
    figures.figures_of_run(folder, Pretrained(unet, scheduler, {}, {}, folder), Zeros(), config)
    return {path.name for path in (folder / "figures").iterdir()}


def test_all_figures_of_a_run_are_drawn(tmp_path, unet, scheduler):
    metrics(tmp_path / "metrics.jsonl", 3, validation_loss=0.4)
    names = draw_figures(tmp_path, unet, scheduler, ddpm_num_inference_steps=10, eval_batch_size=3)
    plots, strips = {"loss.png", "schedule.png"}, {"forward.png", "reverse.png", "reverse.gif"}
    assert names == plots | strips | {"ddim.png"}
    strip = Image.open(tmp_path / "figures" / "reverse.png")
    assert strip.height == 32 + 6 * 132 - 4  # three images, each with its prediction
    # pyplot would keep every figure, and ask for a display.
    assert "import matplotlib.pyplot" not in Path(figures.__file__).read_text()


def test_the_figures_of_a_run_without_metrics(tmp_path, unet, scheduler):
    names = draw_figures(tmp_path, unet, scheduler, ddpm_num_inference_steps=2, eval_batch_size=1)
    assert "loss.png" not in names and "reverse.gif" in names
