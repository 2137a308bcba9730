"""Compare: draw the same seeds by DDIM in few and in many steps, and by DDPM, and lay them side by side."""

import time

import gradio as gr
import widgets
from checks import MAX_SEED, one_of, plural, seconds_since, time_left, whole
from images import contact_sheet, enlarge, picture, to_images
from model import HERE, Model, evaluations


MOST_IMAGES = 4


def compare(model: Model, seed, class_name, guidance):
    """Yield (gallery, status) while each sampler draws four images, or fewer if the model is slow."""
    seed = whole("seed", seed, 0, MAX_SEED)
    class_name = one_of("class", class_name or model.classes[0], model.classes)
    guidance = model.guidance(guidance, class_name)
    cost = evaluations(guidance)
    number = next((n for n in (MOST_IMAGES, 2) if n * cost * (85 + model.T) <= model.max_evaluations), 1)
    ways, left = [], model.max_evaluations // (number * cost)
    for steps in (5, 10, 20, 50):
        if steps <= min(left, model.T):
            ways.append(("DDIM", steps))
            left -= steps
    ways.append(("DDPM", max(1, min(left, model.T))))
    seeds, labels = [seed + k for k in range(number)], model.class_numbers(class_name, number)
    shown, begin, before, total = [], time.perf_counter(), 0, sum(steps for _, steps in ways)
    for sampler, steps in ways:
        name, start = f"{sampler}, {plural(steps, 'step')}", time.perf_counter()
        for i, x_0, is_due in model.draw_frames(seeds, sampler, steps, labels, guidance):
            if is_due:
                sheet = contact_sheet([enlarge(image) for image in to_images(x_0)], columns=min(2, number))
            if is_due and i < steps:
                yield [*shown, picture(sheet, name)], f"{name}: step {i}, {time_left(begin, before + i, total)}."
        shown.append(picture(sheet, f"{name}, drawn in {seconds_since(start)}"))
        before += steps
    what = f"seed{'s' * (number > 1)} {', '.join(map(str, seeds))}"
    yield shown, f"Done: {what} in {seconds_since(begin)}. Every sheet starts from the same noise."


def add(model: Model) -> dict[str, gr.components.Component]:
    """Build the tab. Return the inputs that a link can set, as {name in the link: input}."""
    with gr.Tab("Compare", id="compare"), gr.Row(elem_classes="sides"):
        with widgets.inputs_column():
            what = "Draw images from the same noise, with DDIM in 5, 10, 20 and 50 steps, and with DDPM in many."
            gr.Markdown(what)
            class_name, guidance = widgets.class_box(model), widgets.guidance_slider(model)
            seed = widgets.seed_box("compare")
            start, stop = widgets.two_buttons("Compare", "Stop", primary="Compare")
        with widgets.outputs_column("compare"):
            status = widgets.status_line("Ready: press Compare, then move the slider over the steps.")
            shown = gr.HTML(
                [],
                html_template=(HERE / "compare.html").read_text(encoding="utf-8"),
                js_on_load=(HERE / "compare.js").read_text(encoding="utf-8"),
                label="Samplers",
                apply_default_css=False,
            )
            settings = {"seed": seed, "class": class_name, "guidance": guidance}
            widgets.share_button("compare", settings, status)
            options = {
                "model": model,
                "inputs": list(settings.values()),
                "outputs": [shown, status],
                "show_progress_on": status,
            }
            widgets.publish(compare, **options, **widgets.BUSY)
    pressed = widgets.next_seeds("compare", start.click, options["inputs"], seed, count=str(MOST_IMAGES))
    event = widgets.answer(pressed, compare, **options, **widgets.BUSY)
    stop.click(None, cancels=[event], api_visibility="private")
    widgets.mark_stale("compare", options["inputs"], status, [pressed], again="press Compare")
    return settings
