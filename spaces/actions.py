"""What the buttons of the Space do: each method checks what was sent, and returns or streams what the page shows."""

import html
import math
import os
import time
from collections.abc import Iterator
from functools import lru_cache

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from images import bundle, contact_sheet, data_url, enlarge, psnr, read_drawing, read_image, to_images, to_tensor
from model import SAMPLERS, Model, Refused, community_pipeline


MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
FRAME_SECONDS = 0.2  # between two looks at images that form
SOURCES = ("The model's own", "Upload", "Draw")
DAMAGES = ("Noise", "Hole", "Blur", "Low resolution", "No colour")
STRENGTHS = ("Light", "Medium", "Strong")
IN_TURN, NO_CLASS = "each class in turn", "no class"


class Actions:
    """The page's endpoints on one model. One request may cost `max_evaluations` evaluations of one image each."""

    def __init__(self, model: Model):
        self.model = model
        seconds = float(os.environ.get("DDPM_REQUEST_SECONDS", "60"))
        evaluations = max(1, int(model.evaluations_per_second * seconds))
        digits = 10 ** max(0, len(str(evaluations)) - 2)
        self.max_evaluations = evaluations // digits * digits  # two digits are what the measurement is worth
        self.example = lru_cache(64)(self._example)
        self.pipeline = None
        if not model.labels or model.null_class is not None:
            id2label = dict(enumerate(model.labels)) or None
            self.pipeline = community_pipeline("restoration").RestorationPipeline(
                model.unet, model.scheduler, id2label
            )
            self.pipeline.set_progress_bar_config(disable=True)

    @property
    def damages(self) -> list[str]:
        """What can be done to an image and be undone: nothing loses its colour that has none."""
        return [damage for damage in DAMAGES if damage != "No colour" or self.model.channels > 1]

    @property
    def classes(self) -> list[str]:
        """What may be asked for, [""] where the model knows no classes."""
        more = [NO_CLASS] if self.model.null_class is not None else []
        return [IN_TURN, *self.model.labels, *more] if self.model.labels else [""]

    def affordable_steps(self, number: int, wanted: int) -> int:
        """As many of the steps wanted as one request may take for so many images, at least one."""
        return max(1, min(wanted, self.model.T, self.max_evaluations // number))

    def generate(self, number, sampler, steps, seed, class_name, guidance):
        """Stream (gallery, status, zip): the x_0 predicted by each step, at most one in FRAME_SECONDS."""
        number, steps = whole("number of images", number, 1, MAX_IMAGES), whole("steps", steps, 1, self.model.T)
        sampler, seed = one_of("sampler", sampler, SAMPLERS), whole("seed", seed, 0, MAX_SEED)
        class_name = one_of("class", class_name or self.classes[0], self.classes)
        guidance = between("guidance", 1 if guidance is None else guidance, 0, 10)
        if self.model.null_class is None or class_name == NO_CLASS:
            guidance = 1.0
        cost = number * steps * (1 if guidance == 1 else 2)
        if cost > self.max_evaluations:
            raise Refused(
                f"{number} images in {steps} steps are {cost:,} evaluations of the network, and one request has "
                f"{self.max_evaluations:,} here: take fewer steps or images{', or guidance 1' * (guidance != 1)}."
            )
        seeds, labels = [seed + k for k in range(number)], self._labels(class_name, number)
        captions = [f"seed {one}" for one in seeds]
        if labels and class_name != NO_CLASS:
            captions = [
                f"{html.escape(self.model.labels[label])} · {caption}" for label, caption in zip(labels, captions)
            ]
        start, what = time.perf_counter(), f"{plural(number, 'image')}, {sampler}"
        yield gr.skip(), f"Starting {what}, {plural(steps, 'step')}.", gr.update(interactive=False)
        for i, x_0 in self._frames(self.model.sample(seeds, sampler, steps, labels, guidance)):
            shown = [picture(image, caption) for image, caption in zip(to_images(x_0), captions)]
            if i < steps:
                yield shown, f"{what}: step {i} of {steps}.", gr.skip()
        settings = {
            "model": self.model.name, "sampler": sampler, "num_inference_steps": steps, "seeds": seeds,
            "class": class_name, "guidance_scale": guidance,
        }  # fmt: skip
        archive = bundle(to_images(x_0), seeds, settings)
        path = save_bytes_to_cache(archive, f"images_seed_{seed}.zip", get_upload_folder())
        done = f"Done: {what}, {plural(steps, 'step')}, seed {seed}, in {seconds_since(start)}."
        yield shown, done, path

    def compare(self, seed, class_name):
        """Stream (gallery, status): four images of one seed, or fewer of a large model, by each sampler in turn."""
        seed = whole("seed", seed, 0, MAX_SEED)
        class_name = one_of("class", class_name or self.classes[0], self.classes)
        number = next((n for n in (4, 2) if n * (85 + self.model.T) <= self.max_evaluations), 1)
        ways, left = [], self.max_evaluations // number
        for steps in (5, 10, 20, 50):
            if steps <= min(left, self.model.T):
                ways.append(("DDIM", steps))
                left -= steps
        ways.append(("DDPM", max(1, min(left, self.model.T))))
        seeds, labels = [seed + k for k in range(number)], self._labels(class_name, number)
        shown, begin = [], time.perf_counter()
        for sampler, steps in ways:
            name, start = f"{sampler}, {plural(steps, 'step')}", time.perf_counter()
            for i, x_0 in self._frames(self.model.sample(seeds, sampler, steps, labels)):
                sheet = contact_sheet([enlarge(image) for image in to_images(x_0)], columns=min(2, number))
                if i < steps:
                    yield [*shown, picture(sheet, name)], f"{name}: step {i}."
            shown.append(picture(sheet, f"{name} · {seconds_since(start)}"))
        what = f"seed{'s' * (number > 1)} {', '.join(map(str, seeds))}"
        yield shown, f"Done: {what} in {seconds_since(begin)}. Every sheet begins with the same noise."

    def degrade(self, source, upload, drawing, damage, strength, seed):
        """Return (gallery, status): the image as the model would see it, and damaged."""
        clean, damaged, what, _ = self._damaged(source, upload, drawing, damage, strength, seed)
        shown = [picture(clean, "Original"), picture(as_large(damaged, clean), what)]
        return shown, f"{what}: now restore it."

    def restore(self, source, upload, drawing, damage, strength, seed, progress=gr.Progress()):  # noqa: B008
        """Return (gallery, status): the image, damaged, and restored by the restoration pipeline."""
        clean, damaged, what, arguments = self._damaged(source, upload, drawing, damage, strength, seed)
        # A mean of several for what has one answer, one for a hole, which has many; noise takes one evaluation.
        samples = 4 if damage not in ("Noise", "Hole") and self.max_evaluations >= 100 else 1
        steps = 1 if damage == "Noise" else self.affordable_steps(samples, 25)
        start = time.perf_counter()

        def show_step(pipeline, i, t, tensors):
            progress((i + 1, steps), desc="Restoring")

        images = self.pipeline(
            damaged / 2 + 0.5,
            **arguments,
            num_inference_steps=steps,
            num_samples=samples,
            generator=[torch.Generator().manual_seed(seed + 2)],
            output_type="pt",
            callback_on_step_end=show_step,
        ).images
        seconds, restored, damaged = seconds_since(start), 2 * images.cpu() - 1, as_large(damaged, clean)
        shown = [picture(clean, "Original"), picture(damaged, what), picture(restored, "Restored")]
        if damage == "Hole":
            return shown, f"Done in {seconds}. Many images fit around a hole: another seed draws another one."
        before, after = psnr(damaged, clean), psnr(restored, clean)
        return shown, f"Done in {seconds}: {before:.1f} dB PSNR before, {after:.1f} dB after (more is closer)."

    def forward(self, source, upload, drawing, t, seed):
        """Return (gallery, status, bar): x_t of the image, and the clean image that the network sees in it."""
        t, seed = whole("t", t, 0, self.model.T), whole("seed", seed, 0, MAX_SEED)
        x_0 = self._image(source, upload, drawing, seed)
        x_t, alpha_bar = self.model.forward(x_0, t, seed + 1)  # not the noise that the model's own image came from
        shown = [picture(x_0, "Image x₀"), picture(x_t, f"Noisy, t = {t}")]
        if self.pipeline is not None:
            shown.append(picture(self.model.guess(x_t, t) if t else x_0, "The network's guess"))
        text = f"x at t = {t} is √{alpha_bar:.4f} · x₀ + √{1 - alpha_bar:.4f} · noise."
        return shown, text, 100 * alpha_bar

    def _frames(self, steps: Iterator[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Steps counted from 1: the last one, and before it those FRAME_SECONDS apart."""
        shown, step = time.perf_counter(), None
        for i, x_0 in enumerate(steps, 1):
            step = i, x_0
            if time.perf_counter() - shown >= FRAME_SECONDS:
                yield step
                shown, step = time.perf_counter(), None
        if step is not None:
            yield step

    def _labels(self, class_name: str, number: int) -> list[int] | None:
        if not self.model.labels:
            return None
        if class_name == IN_TURN:
            return [k % len(self.model.labels) for k in range(number)]
        return [self.model.null_class if class_name == NO_CLASS else self.model.labels.index(class_name)] * number

    def _example(self, seed: int) -> torch.Tensor:
        labels = [seed % len(self.model.labels)] if self.model.labels else None
        *_, x_0 = self.model.sample([seed], "DDIM", self.affordable_steps(1, 50), labels)
        return x_0.cpu()

    def _image(self, source, upload, drawing, seed: int) -> torch.Tensor:
        """The visitor's image as the model takes it, (1, C, H, W) in [-1, 1]."""
        source = one_of("source", source, SOURCES)
        if source == SOURCES[0]:
            return self.example(seed)
        if source == "Draw":
            return to_tensor(read_drawing(drawing), self.model.size, self.model.channels)
        path = upload.get("path") if isinstance(upload, dict) else None
        if path is None:
            raise Refused("No image is uploaded yet: upload one, or choose another source.")
        return to_tensor(read_image(path), self.model.size, self.model.channels)

    def _damaged(self, source, upload, drawing, damage, strength, seed):
        """The image, damaged, in words, and what the pipeline must be told to undo it; images in [-1, 1]."""
        if self.pipeline is None:
            raise Refused("This model draws only images of a class, and restoring needs one that need not be told it.")
        damage, level = (
            one_of("damage", damage, self.damages),
            STRENGTHS.index(one_of("strength", strength, STRENGTHS)),
        )
        seed, (height, width) = whole("seed", seed, 0, MAX_SEED), self.model.size
        clean = self._image(source, upload, drawing, seed)
        if damage == "Noise":
            sigma = (0.15, 0.3, 0.5)[level]
            arguments, what = {"task": "denoise", "noise_level": sigma}, f"Noise of {sigma}"
        elif damage == "Hole":
            share = (0.3, 0.45, 0.6)[level]
            h, w = round(height * share), round(width * share)
            top, left = (height - h) // 2, (width - w) // 2
            mask = torch.zeros(height, width)
            mask[top : top + h, left : left + w] = 1
            arguments, what = {"task": "inpaint", "mask": mask}, f"A hole of {h} x {w} pixels"
        elif damage == "Blur":
            sigma = max(height, width) * (0.04, 0.06, 0.09)[level]
            arguments, what = {"task": "deblur", "blur_sigma": sigma}, f"Blur of {sigma:.1f} pixels"
        elif damage == "Low resolution":
            common = math.gcd(height, width)
            factor = max(k for k in range(1, 2 ** (level + 1) + 1) if common % k == 0 and common // k > 1)
            arguments = {"task": "super_resolution", "scale_factor": factor}
            what = f"{height // factor} x {width // factor} pixels"
        else:
            arguments, what = {"task": "colorize"}, "Without colour"
        generator = [torch.Generator().manual_seed(seed + 1)]
        return clean, 2 * self.pipeline.degrade(clean / 2 + 0.5, **arguments, generator=generator) - 1, what, arguments


def whole(name: str, value, low: int, high: int) -> int:
    """`value` as a whole number from low to high, or Refused."""
    return int(between(name, value, low, high, kind=int))


def between(name: str, value, low: float, high: float, kind: type = float) -> float:
    """`value` as a number from low to high, or Refused."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or kind(value) != value:
        wanted = "whole number" if kind is int else "number"
        raise Refused(f"The {name} is {str(value)[:40]!r}: give a {wanted} from {low} to {high}.")
    return kind(value)


def one_of(name: str, value, choices) -> str:
    """`value`, if it is one of the choices, or Refused."""
    if value not in choices:
        raise Refused(f"The {name} is {str(value)[:40]!r}: choose {', '.join(choices)}.")
    return value


def picture(image, caption: str) -> dict[str, str]:
    """What the page shows of an image, or a tensor (1, C, H, W) in [-1, 1]: a PNG as a data URL, and its caption."""
    image = to_images(image)[0] if isinstance(image, torch.Tensor) else image
    return {"image": data_url(image), "caption": caption}


def as_large(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A small or grey image as large as `like`, its pixels repeated."""
    factor = like.shape[-1] // x.shape[-1]
    return x.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2).expand_as(like).cpu()


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def seconds_since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
