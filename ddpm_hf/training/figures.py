"""Draw the figures of a run: the loss, the schedule, the forward and the reverse process, and samples in few steps.

Most functions write one file under a temporary name, rename it and return its path. Small images are enlarged by whole
factors without smoothing, so that a pixel becomes a square. Plots do not use pyplot, because it keeps global state.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..data.origins import naming_origin
from ..diffusion.scheduler import PaperDDPMScheduler
from ..errors import UserError
from ..files import writing
from ..locks import locked
from ..models.pretrained import Pretrained, load_pretrained
from ..pictures import evenly, near_square, resize, save_picture, side_by_side, strip, tile, to_uint8
from ..randomness import keyed_generator
from ..run_folder import read_metrics
from ..sampling.samplers import distinct_steps
from ..sampling.settings import Sampler


BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#e07b1a", "#2f9e57", "#9a9a9a"
# Each has a contrast of at least 3 with white. Noisier timesteps are lighter.
BANDS = {"0 to T/4": "#12355b", "T/4 to T/2": "#2a78b8", "T/2 to 3T/4": "#2a9188", "3T/4 to T": "#c27a1c"}
FRAMES = 40  # more frames would make the GIF smoother, but the file larger
DDIM_STEPS = (5, 10, 20, 50)  # divisors of 1000, so that trailing spacing is even
SHEET_IMAGES = 8  # at most, in each row of ddim.png and guided.png
GUIDED_CLASSES, GUIDED_STEPS = 10, 25  # at most, in guided.png


def forward_strip(scheduler: PaperDDPMScheduler, images: torch.Tensor, path, seed: int) -> Path:
    """Draw images (N, C, H, W) in [-1, 1] with more and more noise: one row per image.

    The columns are x_t for t = 0, T/8, ..., 7T/8, T-1. All columns of a row have the same noise.
    """
    timesteps = sorted({k * len(scheduler) // 8 for k in range(8)} | {len(scheduler) - 1})
    noise = [torch.randn(images.shape[1:], generator=keyed_generator(seed, "forward", k)) for k in range(len(images))]
    rows = [scheduler.q_sample(x[None], e[None], torch.tensor(timesteps)) for x, e in zip(images.cpu(), noise)]
    return strip([to_uint8(row) for row in rows], [f"t = {t}" for t in timesteps], [], path)


def reverse_strip(frames: list[tuple[torch.Tensor, torch.Tensor]], labels: list[str], path) -> Path:
    """Draw the reverse process: one column per frame, and two rows per image, the sample and the predicted x_0.

    `frames` are pairs (sample, pred_original_sample), both (N, C, H, W), as `draw` passes them to on_step.
    """
    samples, predictions = (to_uint8(torch.stack(part, dim=1)) for part in zip(*frames))
    rows = [row for pair in zip(samples, predictions) for row in pair]
    return strip(rows, labels, ["sample", "predicted"] * len(samples), path)


def reverse_gif(frames: list[torch.Tensor], path) -> Path:
    """Draw a looping GIF of up to 16 images that form from noise, in up to 40 frames.

    The last frame is shown for 2 s.

    `frames` are samples (N, C, H, W) in [-1, 1], in the order from noise to image.
    """
    sheets = [resize(side_by_side(to_uint8(frame[:16])), 84) for frame in evenly(frames, FRAMES)]
    # Frames of noise take most of the bytes, but need few colours. The images at the end get all 256 colours.
    few, columns = 16 if sheets[0].shape[1] == 1 else 64, near_square(len(sheets[0]))
    colors = [few if k < 0.8 * len(sheets) else 256 for k in range(len(sheets))]
    pictures = [tile(sheet, columns).quantize(n, dither=Image.Dither.NONE) for sheet, n in zip(sheets, colors)]
    options = dict(duration=[100] * (len(pictures) - 1) + [2000], loop=0, optimize=True)
    return save_picture(pictures[0].save, path, save_all=True, append_images=pictures[1:], **options)


def ddim_steps(T: int) -> list[int]:
    """Return the numbers of steps that `ddim_sheet` shows: those of DDIM_STEPS, with T instead of larger numbers."""
    return sorted({min(count, T) for count in DDIM_STEPS})


def ddim_sheet(model: Pretrained, path, seed, *, num_images, on_step=None) -> Path:
    """Draw the same images by DDIM in 5, 10, 20 and 50 steps: one labelled row for each number of steps.

    If T is below 50, T replaces the larger numbers of steps. The timesteps are trailing, i.e. they begin at T-1,
    because samples begin as pure noise. At most 8 images are drawn.
    """
    numbers, rows = range(min(num_images, SHEET_IMAGES)), []
    for count in ddim_steps(len(model.scheduler)):
        sampler = Sampler(name="ddim", num_inference_steps=count, seed=seed).resolve(model)
        rows.append(to_uint8(sampler.draw(model, numbers, on_step)))
    row_labels = [f"DDIM, {count} steps" for count in ddim_steps(len(model.scheduler))]
    return strip(rows, [f"image {k}" for k in numbers], row_labels, path)


def guided_sheet(model: Pretrained, path, seed, *, num_images, on_step=None) -> Path:
    """Draw a labelled row of images for each class, with guidance 2, by DDIM in 25 steps. At most 10 rows of 8 images.

    All rows start from the same noise, so that they differ only by the class.
    """
    numbers, classes = range(min(num_images, SHEET_IMAGES)), range(min(len(model.classes), GUIDED_CLASSES))
    steps = min(GUIDED_STEPS, len(model.scheduler))
    sampler = Sampler(name="ddim", num_inference_steps=steps, seed=seed, guidance_scale=2.0)
    rows = [
        to_uint8(replace(sampler, class_labels=label).resolve(model).draw(model, numbers, on_step))
        for label in classes
    ]
    names = [str(model.classes.names[k] if model.classes.names else k)[:24] for k in classes]
    return strip(rows, [f"image {k}" for k in numbers], names, path)


def plot(mosaic, titles: list[str], height: float, **ratios):
    """Return an empty matplotlib Figure, and a dict of its axes. The keys are the letters in `mosaic`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=120)
    axes = figure.subplot_mosaic(mosaic, **ratios)
    # Set the margins, in inches. A layout engine would draw all texts once more to measure them.
    figure.subplots_adjust(0.9 / 11, 0.5 / height, 1 - 0.1 / 11, 1 - 0.35 / height, wspace=0.26, hspace=0.5)
    for ax, title in zip(axes.values(), titles):
        ax.set_title(title, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving mean of a curve, over a thirtieth of its points.

    At the start, where losses fall steeply, the mean is over fewer points.
    """
    total = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    half_width = np.minimum(at // 2, math.ceil(len(values) / 60))
    end = np.minimum(at + half_width + 1, len(values))
    return (total[end] - total[at - half_width]) / (end - at + half_width)


def loss_figure(metrics_path, path) -> Path | None:
    """Plot metrics.jsonl: training and validation loss, loss for each quarter of the timesteps, learning rate.

    Return None, and draw nothing, if metrics.jsonl is missing or no line of it is complete.
    """
    lines = [line for line in read_metrics(metrics_path) if line.keys() >= {"lr", "loss_by_band"}]
    if not lines:
        return None
    all_steps = np.array([line["step"] for line in lines])
    titles = ["training and validation loss", "training loss by timestep t", "learning rate"]
    figure, axes = plot("AB;AC", titles, 5, width_ratios=[5, 4], height_ratios=[3, 1])

    def curve(ax, values, label, color, training=True):
        values = np.array(values, dtype=float)  # None becomes nan
        steps, values = all_steps[~np.isnan(values)], values[~np.isnan(values)]
        if not len(values):
            return
        marker = "o" if not training and len(values) < 60 else ""
        if training:
            ax.plot(steps, values, ".", color=color, alpha=np.clip(60 / len(values), 0.02, 0.5), markersize=4)
            values = smooth(values)
        ax.plot(steps, values, marker=marker, color=color, label=f"{label}: {values[-1]:.4f}", markersize=4)

    curve(axes["A"], [line.get("loss") for line in lines], "training", BLUE)
    curve(axes["A"], [line.get("validation_loss") for line in lines], "validation", ORANGE, training=False)
    curve(axes["A"], [line.get("validation_loss_ema") for line in lines], "validation, EMA", GREEN, training=False)
    for values, (label, color) in zip(zip(*[line["loss_by_band"] for line in lines]), BANDS.items()):
        curve(axes["B"], values, label, color)
    axes["C"].plot(all_steps, [line["lr"] for line in lines], ".-", color=GREY, markersize=3)

    for name in "ABC":
        what = "learning rate" if name == "C" else "loss, mean over images"
        axes[name].set(xlabel="optimizer step", ylabel=what, xlim=(0, 1.02 * all_steps[-1]))
        axes[name].locator_params(axis="x", nbins=6)
        axes[name].xaxis.set_major_formatter("{x:,.0f}")
    for name in "AB":
        # Fit the axis without the first fiftieth, where the loss falls from 1, because that would flatten the rest.
        late = [line.get_ydata()[len(line.get_ydata()) // 50 :] for line in axes[name].lines]
        late = np.concatenate([values[values > 0] for values in late]) if late else np.empty(0)
        if len(late):  # a logarithmic axis and its limits need losses above 0
            low, high = late.min() / 1.1, late.max() * 1.1
            if name == "B" or high > 5 * low:
                axes[name].set_yscale("log", subs=[2, 5])
                axes[name].yaxis.set_minor_formatter("{x:g}")
            axes[name].set_ylim(low, high if name == "A" else high * (high / low) ** 0.35)  # room for B's legend
        axes[name].yaxis.set_major_formatter("{x:g}")
        if axes[name].lines:
            axes[name].legend(edgecolor="none", loc="upper right", ncols="AB".index(name) + 1)
    return save_picture(figure.savefig, path)


def schedule_figure(scheduler: PaperDDPMScheduler, path) -> Path:
    """Plot beta, abar and log-SNR over t/T.

    For comparison, a dashed line shows Nichol's cosine schedule. If this is the schedule of the model, the dashed line
    shows Ho's linear schedule.
    """
    T, config = len(scheduler), scheduler.config
    own = config.beta_schedule if config.trained_betas is None else "its own betas"
    other, name = PaperDDPMScheduler.nichol_cosine(T), "Nichol's cosine"
    if own == "squaredcos_cap_v2":
        other, name = PaperDDPMScheduler.ho_linear(max(T, 21)), "Ho's linear"
    figure, axes = plot("ABC", ["noise added per step", "signal left", "signal-to-noise ratio"], 3.6)
    faint, bold = dict(color=GREY, ls="--", label=name), dict(color=BLUE, lw=2, label=f"this model ({own})")
    for each, look in [(other, faint), (scheduler, bold)]:
        t, signal = np.arange(len(each)) / len(each), each.alphas_cumprod64.numpy()
        axes["A"].semilogy(t, each.betas64.numpy(), **look)
        axes["B"].plot(t, signal, **look)
        with np.errstate(divide="ignore"):  # with --rescale_betas_zero_snr, no signal is left in the end
            axes["C"].plot(t, np.log(signal) - np.log1p(-signal), **look)
    for ax, what in zip(axes.values(), (r"$\beta_t$", r"$\bar\alpha_t$", r"$\log\,\mathrm{SNR}(t)$, natural log")):
        ax.set(xlabel="timestep, t / T", ylabel=what)
    axes["A"].minorticks_off()
    axes["A"].yaxis.set_major_formatter("{x:g}")
    axes["A"].legend(frameon=False, loc="lower right")
    return save_picture(figure.savefig, path)


def reverse_figures(model: Pretrained, folder: Path, sampler: Sampler, *, num_images, on_step):
    """Draw reverse.png and reverse.gif: how a resolved `sampler` turns noise into images."""
    steps = distinct_steps(model.scheduler, sampler.num_inference_steps, sampler.timesteps)
    kept = evenly(range(len(steps)), FRAMES)
    frames = []

    def keep_frame(i, num_steps, *pair):
        on_step(i, num_steps, *pair)
        if i in kept:
            label = f"t = {steps[i][1]}" if i < num_steps - 1 else "image"
            frames.append((label, [part.cpu() for part in pair]))

    sampler.draw(model, range(num_images), keep_frame)
    captions, pairs = zip(*evenly(frames, 9))
    reverse_strip([[part[:3] for part in pair] for pair in pairs], captions, folder / "reverse.png")
    reverse_gif([samples for _, (samples, _) in frames], folder / "reverse.gif")


def figures_of_run(run_folder: Path, model: Pretrained, train_set, config: TrainingConfig, on_step=None):
    """Draw the figures of a run into `run_folder`/figures.

    loss.png is drawn only if the folder has a metrics.jsonl, and guided.png only if the model can be guided. DDPM and
    DDIM start from the same noise. The GIF shows the first 16 samples, and ddim.png the first 8.

    Args:
        train_set: its first 4 images show how noise is added.
        on_step: called after every step of sampling, as in `draw`.
    """
    folder, seed, num_images = Path(run_folder, "figures"), config.seed, min(16, config.eval_batch_size)
    loss_figure(Path(run_folder, "metrics.jsonl"), folder / "loss.png")
    schedule_figure(model.scheduler, folder / "schedule.png")
    images = train_set.get(list(range(min(4, train_set.num_images or 4))))
    forward_strip(model.scheduler, images, folder / "forward.png", seed)
    sampler = Sampler(num_inference_steps=config.ddpm_num_inference_steps, seed=seed).resolve(model)
    total = sampler.num_inference_steps + sum(ddim_steps(len(model.scheduler)))
    with tqdm(total=total, desc="Figures", unit="step") as bar:

        def count(*step):
            bar.update()
            if on_step is not None:
                on_step(*step)

        reverse_figures(model, folder, sampler, num_images=num_images, on_step=count)
        ddim_sheet(model, folder / "ddim.png", seed, num_images=num_images, on_step=count)
    if model.classes.no_class is not None:
        guided_sheet(model, folder / "guided.png", seed, num_images=num_images, on_step=on_step)


def config_of(model: Pretrained, **changes) -> TrainingConfig:
    """Return the config of the run that trained a model, with the flags in `changes` changed.

    Raises:
        UserError: if this version cannot read the train_config.json of the run.
    """
    try:
        return TrainingConfig(**model.run["flags"] | changes)
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{model.run_folder}/train_config.json is not of this version ({error}): train the model again."
        ) from error


def redraw_figures(folder: str | Path):
    """Draw the figures of a run again, from its pipeline, its metrics and its data.

    Raises:
        UserError: if the folder is not the run of a DDPM, if the run has no pipeline yet, if another process is
            writing to the folder, or if the data of the run cannot be read.
    """
    folder = Path(folder)
    if (folder / "classifier").is_dir() and not (folder / "model_index.json").is_file():  # an export has both
        only = folder / "figures" / "loss.png"
        raise UserError(f"{folder} is the run of a classifier, whose only figure is {only}: give the run of a DDPM.")
    if not (folder / "train_config.json").is_file() or not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a run with a pipeline: give the --output_dir of a training.")
    with contextlib.ExitStack() as stack:
        with writing("the figures", folder):
            stack.enter_context(locked(folder, "wait until it ends; a run draws the figures itself"))
        model = load_pretrained(str(folder))
        config = config_of(model)
        with naming_origin(model.run["flags"], f"{folder / 'train_config.json'}", "so put its data back there"):
            train_set, _ = load_images(config, model.unet.config.in_channels)
        model.unet.to(PartialState().device)
        figures_of_run(folder, model, train_set, config)
