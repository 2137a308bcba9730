"""Restore: damage the model's own image, an upload or a drawing, and restore it by pipelines/restoration.py."""

import math
import time
from functools import partial

import gradio as gr
import torch
import widgets
from checks import MAX_SEED, Refused, one_of, seconds_since, time_left, whole
from images import SOURCES, UNFAMILIAR, as_large, is_visitors, picture, psnr, visitor_image
from model import Model


STRENGTHS = ("Light", "Medium", "Strong")
NEEDS_NO_CLASS = "This model always needs a class, and such models cannot restore images: open another model."


def noise(size: tuple[int, int], level: int) -> tuple[dict, str]:
    """Return the arguments with which the restoration pipeline adds or removes noise, and a caption.

    `level` is 0 (light), 1 or 2 (strong). The functions below also return arguments and a caption, for other kinds
    of damage.
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
    hint = UNFAMILIAR if is_visitors(source) and model.is_unfamiliar(clean) else ""
    shown = [picture(clean, "Original"), picture(as_large(damaged, clean), caption)]
    return shown, f"{caption}: press Restore.{hint}"


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
        progress((i + 1, steps), desc=f"Restoring, {time_left(start, i + 1, steps)}")

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
    hint = UNFAMILIAR if is_visitors(source) and model.is_unfamiliar(clean) else ""
    if damage == "Hole":
        return shown, f"Done in {seconds}. Many images fit a hole: try another seed.{hint}"
    before, after = psnr(damaged, clean), psnr(restored, clean)
    return shown, f"Done in {seconds}: {before:.1f} dB PSNR before, {after:.1f} dB after (more is closer).{hint}"


def first_pictures(model: Model) -> tuple[list[dict], str]:
    """Return the gallery and the status that the tab opens with."""
    if not model.is_fast:
        return [], "Ready. Choose the model's own image, upload one or draw one."
    return degrade(model, SOURCES[0], None, "", "Hole", "Medium", 0)


def add(model: Model) -> dict[str, gr.components.Component]:
    """Build the tab. Return the inputs that a link can set, as {name in the link: input}."""
    with gr.Tab("Restore", id="restore"):
        if model.restoration is None:
            gr.Markdown(NEEDS_NO_CLASS)
            return {}
        with gr.Row(elem_classes="sides"):
            with widgets.inputs_column():
                inputs = widgets.image_inputs(model)
                damage = gr.Radio(damages(model), value="Hole", label="Damage")
                strength = gr.Radio(STRENGTHS, value="Medium", label="Strength")
                seed = widgets.seed_box()
                button = gr.Button("Restore", variant="primary", elem_classes="buttons")
            with widgets.outputs_column("restore"):
                pictures, text = first_pictures(model)
                status = widgets.status_line(text)
                shown = widgets.gallery("Before and after", columns=3, value=pictures)
                values = [["Noise", "Strong"], ["Hole", "Strong"], ["Low resolution", "Medium"]]
                names = ["Strong noise", "A large hole", "Few pixels"]
                chosen = widgets.example_buttons(dict(zip(names, values)), [damage, strength])
                settings = {"damage": damage, "strength": strength, "seed": seed}
                widgets.share_button("restore", settings, status)
                inputs, outputs = [*inputs, damage, strength, seed], [shown, status]
                options = {"model": model, "inputs": inputs, "outputs": outputs}
                busy = {**options, **widgets.BUSY, "show_progress_on": status}
                widgets.publish(degrade, **options, **widgets.QUICK)
                widgets.publish(restore, **busy)
    changes = [part.input if isinstance(part, gr.Radio) else part.change for part in inputs]
    live = {**options, **widgets.QUICK, "trigger_mode": "always_last"}
    widgets.answer(partial(gr.on, changes), degrade, refused=([],), **live)
    for event in (button.click, *chosen):
        widgets.answer(event, restore, **busy)
    button.click(None, inputs, None, js=widgets.SHOW.replace("NAME", "restore"), api_visibility="private")
    return settings
