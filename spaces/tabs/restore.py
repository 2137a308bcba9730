"""Restore: damage the model's own image, an upload or a drawing, and restore it by pipelines/restoration.py."""

import math
import time

import gradio as gr
import torch
import widgets
from checks import MAX_SEED, Refused, one_of, seconds_since, whole
from images import as_large, picture, psnr, visitor_image
from model import Model


STRENGTHS = ("Light", "Medium", "Strong")
NEEDS_NO_CLASS = "This model always needs a class, and such models cannot restore images: open another model."


def noise(size: tuple[int, int], level: int) -> tuple[dict, str]:
    """Return the restoration pipeline's arguments to add or remove noise, and a caption.

    `level` is 0 to 2, from light to strong. The functions below return the same for other kinds of damage.
    """
    sigma = (0.15, 0.3, 0.5)[level]
    return {"task": "denoise", "noise_level": sigma}, f"Noise of {sigma}"


def hole(size: tuple[int, int], level: int) -> tuple[dict, str]:
    h, w = (round(side * (0.3, 0.45, 0.6)[level]) for side in size)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    mask = torch.zeros(size)
    mask[top : top + h, left : left + w] = 1
    return {"task": "inpaint", "mask": mask}, f"A hole of {h} x {w} pixels"


def blur(size: tuple[int, int], level: int) -> tuple[dict, str]:
    sigma = max(size) * (0.04, 0.06, 0.09)[level]
    return {"task": "deblur", "blur_sigma": sigma}, f"Blur of {sigma:.1f} pixels"


def low_resolution(size: tuple[int, int], level: int) -> tuple[dict, str]:
    common = math.gcd(*size)
    factor = max(k for k in range(1, 2 ** (level + 1) + 1) if common % k == 0 and common // k > 1)
    return {"task": "super_resolution", "scale_factor": factor}, f"{size[0] // factor} x {size[1] // factor} pixels"


def no_colour(size: tuple[int, int], level: int) -> tuple[dict, str]:
    return {"task": "colorize"}, "Without colour"


DAMAGES = {"Noise": noise, "Hole": hole, "Blur": blur, "Low resolution": low_resolution, "No colour": no_colour}


def damages(model: Model) -> list[str]:
    """Return the names of the kinds of damage for this model. Grey images have no colour to remove."""
    return [name for name in DAMAGES if name != "No colour" or model.channels > 1]


def damaged_image(model: Model, image, damage, strength, seed):
    """Return the clean and the damaged image, both in [-1, 1], a caption, and the pipeline's arguments to restore it.

    `image` is (source, upload, drawing), as the page sends them.
    """
    if model.restoration is None:
        raise Refused(NEEDS_NO_CLASS)
    damage = one_of("damage", damage, damages(model))
    level = STRENGTHS.index(one_of("strength", strength, STRENGTHS))
    seed = whole("seed", seed, 0, MAX_SEED)
    clean = visitor_image(model, *image, seed)
    arguments, caption = DAMAGES[damage](model.size, level)
    generator = [torch.Generator().manual_seed(seed + 1)]
    damaged = 2 * model.restoration.degrade(clean / 2 + 0.5, **arguments, generator=generator) - 1
    return clean, damaged, caption, arguments


# Gradio passes these arguments by position. Its API uses their names.
def degrade(model: Model, source, upload, drawing, damage, strength, seed):
    """Return (gallery, status). The gallery shows the image at the model's size, and the damaged image."""
    clean, damaged, caption, _ = damaged_image(model, (source, upload, drawing), damage, strength, seed)
    return [picture(clean, "Original"), picture(as_large(damaged, clean), caption)], f"{caption}. Now restore it."


# Gradio passes these arguments by position. Its API uses their names.
def restore(model: Model, source, upload, drawing, damage, strength, seed, progress=gr.Progress()):  # noqa: B008
    """Return (gallery, status). The gallery shows the image, the damaged image and the restored image."""
    clean, damaged, caption, arguments = damaged_image(model, (source, upload, drawing), damage, strength, seed)
    # Average several restorations, because their mean is closest to the truth. For a hole show a single one, because
    # the mean of many different fillings is blurred. For noise, one evaluation already gives the mean.
    samples = 4 if damage not in ("Noise", "Hole") and model.max_evaluations >= 100 else 1
    steps = 1 if damage == "Noise" else model.affordable_steps(samples, 25)
    start = time.perf_counter()

    def show_step(pipeline, i, t, tensors):
        progress((i + 1, steps), desc="Restoring")

    images = model.restoration(
        damaged / 2 + 0.5,
        **arguments,
        num_inference_steps=steps,
        num_samples=samples,
        generator=[torch.Generator().manual_seed(seed + 2)],
        output_type="pt",
        callback_on_step_end=show_step,
    ).images
    seconds, restored, damaged = seconds_since(start), 2 * images.cpu() - 1, as_large(damaged, clean)
    shown = [picture(clean, "Original"), picture(damaged, caption), picture(restored, "Restored")]
    if damage == "Hole":
        return shown, f"Done in {seconds}. Many images fit a hole: try another seed."
    before, after = psnr(damaged, clean), psnr(restored, clean)
    return shown, f"Done in {seconds}: {before:.1f} dB PSNR before, {after:.1f} dB after (more is closer)."


def add(model: Model):
    with gr.Tab("Restore"):
        if model.restoration is None:
            gr.Markdown(NEEDS_NO_CLASS)
            return
        with gr.Row():
            with widgets.inputs_column():
                inputs = widgets.image_inputs(model)
                damage = gr.Radio(damages(model), value="Hole", label="Damage")
                strength = gr.Radio(STRENGTHS, value="Medium", label="Strength")
                seed = widgets.seed_box()
                buttons = widgets.two_buttons("Damage", "Restore", primary="Restore")
            with widgets.outputs_column():
                status = widgets.status_line("Ready. Choose an image of the model, upload one or draw one.")
                shown = widgets.gallery("Before and after", columns=3)
    inputs, outputs = [*inputs, damage, strength, seed], [shown, status]
    options = {"inputs": inputs, "outputs": outputs, "show_progress_on": status}
    quick = {**widgets.QUICK, "show_progress": "minimal"}
    widgets.answer(buttons[0].click, degrade, model=model, **options, **quick)
    widgets.answer(buttons[1].click, restore, model=model, **options, **widgets.BUSY)
