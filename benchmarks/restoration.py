"""Compare pipelines/restoration.py with classical methods on held-out real images.

    pip install -e ".[benchmark]"
    python benchmarks/restoration.py MODEL --dataset_name FOLDER --split test --num_images 500

Every method gets the same degraded images, as floats (noise is neither clipped nor rounded), and the same facts about
the degradation: noise level, mask, factor, blur. For each row, the classical methods get the parameters that score
best in PSNR on images of the training set. PSNR and SSIM are means over the images. scikit-image computes them on [0,
1], with results clipped to that range, and SSIM with the Gaussian window of Wang et al. 2004. The method `degraded`
scores the degraded image itself: masked pixels are 0.5, the pixels of a small image are repeated, and a grey image has
its grey in all channels.
"""

import argparse
import functools
import itertools
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
from classical_restoration import CLASSICAL, DIFFUSION, Row, rows
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.models.pretrained import load_pretrained, quiet_diffusers
from ddpm_hf.pictures import resize, save_picture, tile
from ddpm_hf.randomness import keyed_generator
from ddpm_hf.sampling.restoration import open_pipeline
from ddpm_hf.sampling.samplers import image_generators
from ddpm_hf.sampling.settings import DTYPES


ON_SHEET = 8
COLUMNS = ["degradation", "method", "PSNR, dB", "less best classical", "SSIM", "less best classical", "s/image"]


def scores(truth: np.ndarray, result: np.ndarray) -> tuple[float, float]:
    """Return PSNR in dB and SSIM of one image (H, W, C)."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    result = result.clip(0, 1)
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return (
        peak_signal_noise_ratio(truth, result, data_range=1),
        structural_similarity(truth, result, data_range=1, channel_axis=-1, **window),
    )


def as_arrays(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).double().cpu().numpy()


def shown(degraded: np.ndarray, truth: np.ndarray, row: Row) -> np.ndarray:
    """Return degraded images (N, h, w, c) in the shape of the originals, as the method `degraded` scores them."""
    if row.task == "inpaint":
        return np.where(row.arguments["mask"].numpy()[..., None], 0.5, degraded)
    factor = truth.shape[1] // degraded.shape[1]
    return np.broadcast_to(degraded.repeat(factor, axis=1).repeat(factor, axis=2), truth.shape)


def degrade(pipeline, images: torch.Tensor, row: Row, seed: int) -> torch.Tensor:
    """Return the degraded images (N, C, h, w), neither clipped nor rounded. Each image has its own noise generator."""
    generators = [keyed_generator(seed, "degrade", row.task, k) for k in range(len(images))]
    return pipeline.degrade(images, row.task, **row.arguments, generator=generators, output_type="pt")


def tune(pipeline, images: torch.Tensor, row: Row, name: str) -> dict:
    """Return the parameters of a classical method with the best mean PSNR on these images."""
    method, grid = CLASSICAL[name]
    choices = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if len(choices) == 1:
        return choices[0]
    pairs = list(zip(as_arrays(images), as_arrays(degrade(pipeline, images, row, seed=-1))))
    return max(choices, key=lambda p: np.mean([scores(x, method(y, row.arguments, **p))[0] for x, y in pairs]))


def by_diffusion(pipeline, degraded: torch.Tensor, row: Row, arguments, bar, **unknown):
    """Return the pipeline's restorations (N, H, W, C), and the given or estimated noise levels (N,)."""
    images, noise_levels = [], []
    for start in range(0, len(degraded), arguments.batch_size):
        batch = degraded[start : start + arguments.batch_size]
        generators = image_generators(arguments.seed, range(start, start + len(batch)))
        done = pipeline(batch, row.task, **row.arguments | unknown, generator=generators, output_type="pt")
        images.append(as_arrays(done.images))
        noise_levels.append(done.noise_levels.cpu())
        bar.update(len(batch))
    return np.concatenate(images), torch.cat(noise_levels)


def by_classical(name: str, degraded: np.ndarray, row: Row, parameters: dict, bar):
    """Return the restorations (N, H, W, C) of a classical method, and None, because it gives no noise levels."""
    images = []
    for image in degraded:
        images.append(CLASSICAL[name][0](image, row.arguments, **parameters))
        bar.update()
    return np.stack(images), None


def measure(pipeline, row: Row, images: torch.Tensor, *, parameters: dict, arguments, bar) -> tuple[dict, dict]:
    """Return the scores `{method: {"psnr": (N,), "ssim": (N,), "seconds": per image}}` and images of all methods."""
    truth, degraded = as_arrays(images), degrade(pipeline, images, row, arguments.seed)
    arrays = as_arrays(degraded)
    methods = {"degraded": lambda: (shown(arrays, truth, row), None)}
    for name in row.classical:
        methods[name] = functools.partial(by_classical, name, arrays, row, parameters[name], bar)
    for name in row.diffusion:
        unknown = {} if name == DIFFUSION[0] else {"noise_level": None}
        methods[name] = functools.partial(by_diffusion, pipeline, degraded, row, arguments, bar, **unknown)
    found, pictures = {}, {"truth": truth}
    for name, method in methods.items():
        started = time.perf_counter()
        pictures[name], noise_levels = method()
        found[name] = {"seconds": (time.perf_counter() - started) / len(images)}
        found[name]["psnr"], found[name]["ssim"] = map(np.array, zip(*map(scores, truth, pictures[name])))
        if name == DIFFUSION[1]:
            error = noise_levels / row.arguments["noise_level"] - 1
            found[name]["noise_estimate"] = {
                "median_relative_error": error.abs().median().item(),
                "mean_relative_bias": error.mean().item(),
                "share_within_10_percent": (error.abs() <= 0.1).double().mean().item(),
            }
    return found, pictures


def best_classical(row: Row, found: dict, measure: str) -> str | None:
    return max(row.classical, key=lambda name: found[name][measure].mean(), default=None)


def summary(row: Row, found: dict, parameters: dict) -> dict:
    """Return the JSON of a row: means, standard errors, and the pipeline's scores minus the best classical ones."""
    root, methods = len(found["degraded"]["psnr"]) ** 0.5, {}
    for name, values in found.items():
        report = methods[name] = {"seconds_per_image": values["seconds"]}
        if name in row.classical:
            report["parameters"] = parameters[name]
        if "noise_estimate" in values:
            report["noise_estimate"] = values["noise_estimate"]
        for measure in ("psnr", "ssim"):
            report[measure] = values[measure].mean()
            report[f"{measure}_standard_error"] = values[measure].std(ddof=1) / root
            if name in DIFFUSION and row.classical:
                rival = best_classical(row, found, measure)
                difference = values[measure] - found[rival][measure]
                report[f"{measure}_less_best_classical"] = {
                    "best": rival,
                    "mean": difference.mean(),
                    "standard_error": difference.std(ddof=1) / root,
                    "share_of_images_better": float((difference > 0).mean()),
                }
    known = {name: value for name, value in row.arguments.items() if name != "mask"}
    return {"row": row.name, "task": row.task, "known": known, "methods": methods}


def table_rows(report: dict) -> str:
    """Return the lines of a degradation in the Markdown table, one per method, with the best score in bold."""
    lines, methods, first = [], report["methods"], report["row"]
    for name, values in methods.items():
        cells = [first, name]
        for measure, digits in (("psnr", 2), ("ssim", 4)):
            best = values[measure] == max(other[measure] for other in methods.values())
            cells.append(("**{:.{}f}**" if best else "{:.{}f}").format(values[measure], digits))
            gain = values.get(f"{measure}_less_best_classical")
            cells.append(f"{gain['mean']:+.{digits}f} ± {gain['standard_error']:.{digits}f}" if gain else "")
        cells.append(f"{values['seconds_per_image']:.3f}" if name != "degraded" else "")
        lines.append(f"| {' | '.join(cells)} |")
        first = ""
    return "\n".join(lines)


def estimates(reports: list[dict]) -> str:
    """Return a Markdown table of the errors of the estimated noise levels."""
    lines = ["| noise | median error | mean bias | images within 10 % |", "|---|---|---|---|"]
    for report in reports:
        if noise := report["methods"].get(DIFFUSION[1], {}).get("noise_estimate"):
            error, bias, share = (100 * value for value in noise.values())
            lines.append(f"| {report['known']['noise_level']} | {error:.1f} % | {bias:+.1f} % | {share:.1f} % |")
    return "\n".join(lines)


def draw_block(row: Row, pictures: dict, best: str | None) -> Image.Image:
    """Return the first images of a row: original, degraded, best classical method, pipeline."""
    names = ["truth", "degraded", *([best] if best else []), DIFFUSION[0]]
    images = [torch.tensor(pictures[name][:ON_SHEET]).permute(0, 3, 1, 2) for name in names]
    body = tile(resize((torch.cat(images).clamp(0, 1) * 255).round().to(torch.uint8), 64), len(images[0]))
    font, left, top = ImageFont.load_default(16), 170, 36
    block = Image.new("RGB", (left + body.width, top + body.height + 24), "white")
    block.paste(body, (left, top))
    draw = ImageDraw.Draw(block)
    draw.text((left, top / 2), row.name, "black", ImageFont.load_default(20), "lm")
    for k, name in enumerate(names):
        draw.text((left - 10, top + (k + 0.5) * body.height / len(names)), name, "black", font, "rm")
    return block


def draw_page(blocks: list[Image.Image]) -> Image.Image:
    """Return the blocks in two columns."""
    width, height = max(block.width for block in blocks) + 24, max(block.height for block in blocks)
    page = Image.new("RGB", (2 * width, height * -(-len(blocks) // 2)), "white")
    for k, block in enumerate(blocks):
        page.paste(block, (k % 2 * width, k // 2 * height))
    return page


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder of a pipeline, checkpoint of a run, or Hub id")
    add("--dataset_name", required=True, help="Hub id or folder")
    add("--split", default="test", help="held-out images: a split's name, a count or a share; default: test")
    add("--num_images", type=int, default=500, help="number of held-out images, drawn at random; default: 500")
    add("--tuning_images", type=int, default=20, help="training images to tune the classical methods on; default: 20")
    add("--rows", help="only degradations whose name contains this, e.g. denoise; default: all")
    add("--bm3d", action="store_true", help="also BM3D: pip install bm3d (for research only); about 1 s per image")
    add("--batch_size", type=int, default=50, help="images that the pipeline restores together; default: 50")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the UNet; default: float32")
    add("--seed", type=int, default=0, help="seed of the choice of images, the noise and the sampling; default: 0")
    add("--output", type=Path, metavar="JSON", help="file for the numbers; default: only print them")
    add("--sheet", type=Path, metavar="PNG", help="file for a picture of the first images; default: none")
    return parser.parse_args()


def main():
    arguments = parse()
    diffusers.utils.logging.disable_progress_bar()
    model = load_pretrained(arguments.model)
    side = model.unet.config.sample_size
    flags = dict(dataset_name=arguments.dataset_name, validation_split=arguments.split, resolution=side)
    train, held_out = load_images(TrainingConfig(output_dir=".", **flags), model.unet.config.in_channels)
    images, tuning = (
        (images.get(torch.randperm(len(images), generator=generator)[:count].tolist()) + 1) / 2
        for images, generator, count in [
            (held_out, keyed_generator(arguments.seed, "test"), arguments.num_images),
            (train, keyed_generator(arguments.seed, "train"), arguments.tuning_images),
        ]
    )
    pipeline = open_pipeline(model)
    with quiet_diffusers():  # diffusers warns about any cast
        pipeline.unet.to(DTYPES[arguments.dtype])
    pipeline.set_progress_bar_config(disable=True)

    reports, blocks = [], []
    chosen = [row for row in rows(side, images.shape[1], arguments.bm3d) if (arguments.rows or "") in row.name]
    print(f"{len(images)} held-out images, means of each image's score, ± standard errors; seed {arguments.seed}.\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    total = len(images) * sum(len(row.classical) + len(row.diffusion) for row in chosen)
    with tqdm(total=total, unit="image") as bar:
        for row in chosen:
            bar.set_description(row.name)
            parameters = {name: tune(pipeline, tuning, row, name) for name in row.classical}
            found, pictures = measure(pipeline, row, images, parameters=parameters, arguments=arguments, bar=bar)
            reports.append(summary(row, found, parameters))
            blocks.append(draw_block(row, pictures, best_classical(row, found, "psnr")))
            bar.write(table_rows(reports[-1]))
    if any(row.diffusion == DIFFUSION for row in chosen):
        print(f"\n{estimates(reports)}")
    if arguments.output:
        packages = ["torch", "diffusers", "numpy", "scikit-image", *(["bm3d"] if arguments.bm3d else [])]
        record = {
            "model": model.facts,
            "data": {"split": arguments.split, "num_images": len(images), "fingerprint": held_out.fingerprint},
            "seed": arguments.seed,
            "tuning_images": len(tuning),
            "dtype": arguments.dtype,
            "device": str(pipeline.device),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "rows": reports,
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    if arguments.sheet:
        save_picture(draw_page(blocks).save, arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
