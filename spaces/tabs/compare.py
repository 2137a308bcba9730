"""Compare: draw the same seeds by DDIM in few and in many steps, and by DDPM."""

import time

import gradio as gr
import widgets
from checks import MAX_SEED, one_of, plural, seconds_since, whole
from images import contact_sheet, enlarge, picture, to_images
from model import Model


def compare(model: Model, seed, class_name):
    """Yield (gallery, status) while each sampler draws four images, or fewer if the model is large."""
    seed = whole("seed", seed, 0, MAX_SEED)
    class_name = one_of("class", class_name or model.classes[0], model.classes)
    number = next((n for n in (4, 2) if n * (85 + model.T) <= model.max_evaluations), 1)
    ways, left = [], model.max_evaluations // number
    for steps in (5, 10, 20, 50):
        if steps <= min(left, model.T):
            ways.append(("DDIM", steps))
            left -= steps
    ways.append(("DDPM", max(1, min(left, model.T))))
    seeds, labels = [seed + k for k in range(number)], model.class_numbers(class_name, number)
    shown, begin = [], time.perf_counter()
    for sampler, steps in ways:
        name, start = f"{sampler}, {plural(steps, 'step')}", time.perf_counter()
        for i, x_0 in model.draw_frames(seeds, sampler, steps, labels):
            sheet = contact_sheet([enlarge(image) for image in to_images(x_0)], columns=min(2, number))
            if i < steps:
                yield [*shown, picture(sheet, name)], f"{name}: step {i}."
        shown.append(picture(sheet, f"{name} · {seconds_since(start)}"))
    what = f"seed{'s' * (number > 1)} {', '.join(map(str, seeds))}"
    yield shown, f"Done: {what} in {seconds_since(begin)}. Every sheet starts from the same noise."


def add(model: Model):
    with gr.Tab("Compare"), gr.Row():
        with widgets.inputs_column():
            gr.Markdown("Draw images from the same noise, with DDIM in 5, 10, 20 and 50 steps, and with DDPM.")
            class_name, seed = widgets.class_box(model), widgets.seed_box()
            start, stop = widgets.two_buttons("Compare", "Stop", primary="Compare")
        with widgets.outputs_column():
            status, shown = widgets.status_line("Ready."), widgets.gallery("Samplers", columns=3)
    options = {"inputs": [seed, class_name], "outputs": [shown, status], "show_progress_on": status}
    event = widgets.answer(start.click, compare, model=model, **options, **widgets.BUSY)
    stop.click(None, cancels=[event], api_visibility="private")
