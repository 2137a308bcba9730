"""Generate: draw images with a chosen sampler, steps, seed, class and guidance, show each step, and offer files."""

import html
import time

import gradio as gr
import widgets
from checks import (
    MAX_IMAGES,
    MAX_SEED,
    Refused,
    one_of,
    plural,
    request_seconds,
    seconds_since,
    time_left,
    whole,
)
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from images import animation, bundle, enlarged_sheet, picture, thumbnail, to_images
from model import IN_TURN, NO_CLASS, SAMPLERS, Model, evaluations


ENABLE = "() => Array(3).fill({ __type__: 'update', interactive: true })"
GIF_FRAMES = 24
# Keep the slider of the steps within what one request may use. COST is the number of evaluations for one step.
COST = "number * (model.guides && guidance !== 1 && class_name !== model.no_class ? 2 : 1)"
CLAMP = f"""(number, guidance, class_name, steps) => {{
    const model = MODEL, most = Math.max(1, Math.min(model.T, Math.floor(model.most / ({COST}))));
    const info = most < model.T ? model.info.replace("MOST", most).replace("NUMBER", number) : "";
    return {{ __type__: "update", maximum: Math.max(2, most), value: Math.min(steps, most), info }};
}}"""
SAMPLER = f"""(number, guidance, class_name, sampler) => {{
    const model = MODEL, most = Math.max(1, Math.min(model.T, Math.floor(model.most / ({COST}))));
    return sampler === "DDPM" ? most : Math.min(model.steps, most);
}}"""


# Gradio passes these arguments by position. Its API uses their names.
def generate(model: Model, number, sampler, steps, seed, class_name, guidance):
    """Yield (gallery, status, zip, PNG, GIF). The gallery shows the predicted x_0, and at the end the images."""
    number, steps = whole("number of images", number, 1, MAX_IMAGES), whole("steps", steps, 1, model.T)
    sampler, seed = one_of("sampler", sampler, SAMPLERS), whole("seed", seed, 0, MAX_SEED)
    class_name = one_of("class", class_name or model.classes[0], model.classes)
    guidance = model.guidance(guidance, class_name)
    cost = number * steps * evaluations(guidance)
    if cost > model.max_evaluations:
        raise Refused(
            f"{number} images in {steps} steps need {cost:,} evaluations of the network, but one request may use "
            f"{model.max_evaluations:,}: take fewer steps or images{', or guidance 1' * (guidance != 1)}."
        )
    seeds, labels = [seed + k for k in range(number)], model.class_numbers(class_name, number)
    start, what, formation = time.perf_counter(), f"{plural(number, 'image')}, {sampler}", []
    waiting = [gr.update(interactive=False)] * 3
    yield gr.skip(), f"Starting {what}, {plural(steps, 'step')}.", *waiting
    in_gif = {max(1, round(k * steps / GIF_FRAMES)) for k in range(1, GIF_FRAMES + 1)}
    for i, x_0, is_due in model.draw_frames(seeds, sampler, steps, labels, guidance):
        if not is_due and i not in in_gif:
            continue
        images = to_images(x_0)
        if i in in_gif:
            formation.append([thumbnail(image) for image in images])
        if is_due and i < steps:
            left = time_left(start, i, steps)
            yield captioned(model, images, seeds, labels), f"{what}: step {i} of {steps}, {left}.", *[gr.skip()] * 3
    settings = {
        "model": model.name,
        "sampler": sampler,
        "num_inference_steps": steps,
        "seeds": seeds,
        "class": class_name,
        "guidance_scale": guidance,
    }
    done = f"Done: {what}, {plural(steps, 'step')}, seed {seed}, in {seconds_since(start)}."
    yield captioned(model, images, seeds, labels), done, *files(images, formation, seeds, settings)


def captioned(model: Model, images: list, seeds: list[int], labels: list[int] | None) -> list[dict]:
    """Return a gallery of the images. The captions name the class, if there is one, and the seed."""
    captions = [f"seed {one}" for one in seeds]
    if labels is not None:
        names = [name if not name.isdecimal() else f"class {name}" for name in model.labels]
        captions = [f"{html.escape(names[label])}, {caption}" for label, caption in zip(labels, captions)]
    return [picture(image, caption) for image, caption in zip(images, captions)]


def files(images: list, formation: list[list], seeds: list[int], settings: dict) -> list[str]:
    """Save a zip, an enlarged sheet and an animation in the folder of uploads. Return their paths."""
    sheet = enlarged_sheet(images)
    contents = {
        f"images_seed_{seeds[0]}.zip": bundle(images, seeds, sheet, settings),
        f"images_seed_{seeds[0]}.png": sheet,
        f"images_seed_{seeds[0]}.gif": animation(formation, columns=min(4, len(images))),
    }
    return [save_bytes_to_cache(content, name, get_upload_folder()) for name, content in contents.items()]


def first_sheet(model: Model, number: int, steps: int, guidance: float) -> list[dict]:
    """Return the gallery that the page opens with: the images from seed 0, or nothing if the model is slow."""
    if not model.is_fast:
        return []
    seeds, labels = list(range(number)), model.class_numbers(IN_TURN, number)
    *_, x_0 = model.draw(seeds, "DDIM", steps, labels, guidance)
    return captioned(model, to_images(x_0), seeds, labels)


def examples(model: Model, steps: int) -> dict[str, list]:
    """Return the values of the inputs for each example: number, sampler, steps, seed, class and guidance."""
    first, guidance = model.classes[0], model.first_guidance
    cost = evaluations(guidance)
    found = {
        "Sixteen images": [16, "DDIM", model.affordable_steps(16 * cost, min(20, steps)), 0, first, guidance],
        "In five steps only": [4, "DDIM", model.affordable_steps(4 * cost, 5), 0, first, guidance],
        "One image by DDPM": [1, "DDPM", model.affordable_steps(cost, model.T), 1, first, guidance],
    }
    if model.null_class is not None:
        found["Strong guidance"] = [4, "DDIM", model.affordable_steps(8, steps), 0, model.labels[-1], 6.0]
    return found


def add(model: Model) -> dict[str, gr.components.Component]:
    """Build the tab. Return the inputs that a link can set, as {name in the link: input}."""
    first_number = 8 if max(model.size) <= 64 else 4
    first_cost = first_number * evaluations(model.first_guidance)
    first_steps = model.quick_steps(first_cost)
    with gr.Tab("Generate", id="generate"), gr.Row(elem_classes="sides"):
        with widgets.inputs_column():
            number = gr.Slider(1, MAX_IMAGES, value=first_number, step=1, label="Images")
            sampler = gr.Radio(SAMPLERS, value="DDIM", label="Sampler", info="DDIM needs few steps, DDPM many")
            most = model.affordable_steps(first_cost, model.T)
            limit = f"at most MOST for NUMBER images: a request may take {request_seconds():g} s"
            info = limit.replace("MOST", str(most)).replace("NUMBER", str(first_number)) if most < model.T else None
            count = gr.Slider(1, max(2, most), value=first_steps, step=1, label="Steps", info=info)
            class_name = widgets.class_box(model)
            guidance = widgets.guidance_slider(model)
            seed = widgets.seed_box("generate")
            start, stop = widgets.two_buttons("Generate", "Stop", primary="Generate")
        with widgets.outputs_column("generate"):
            sheet = first_sheet(model, first_number, first_steps, guidance.value)
            drawn = f"Ready: these are seeds 0 to {first_number - 1}. Press Generate for new images."
            ready = drawn if sheet else "Ready: press Generate."
            status, shown = widgets.status_line(ready), widgets.gallery("Images", columns=4, value=sheet)
            with gr.Row(elem_classes="downloads"):
                names = ("Download as zip", "Sheet as PNG", "Formation as GIF")
                downloads = [gr.DownloadButton(name, interactive=False, size="sm", min_width=90) for name in names]
            inputs = [number, sampler, count, seed, class_name, guidance]
            chosen = widgets.example_buttons(examples(model, first_steps), inputs)
            settings = dict(zip(("images", "sampler", "steps", "seed", "class", "guidance"), inputs))
            widgets.share_button("generate", settings, status)
            results = [shown, status, *downloads]
            options = {"model": model, "inputs": inputs, "outputs": results, "show_progress_on": status}
            widgets.publish(generate, **options, **widgets.BUSY)
    facts = {"T": model.T, "most": model.max_evaluations, "steps": first_steps}
    facts |= {"guides": model.null_class is not None, "no_class": NO_CLASS, "info": limit}
    about, private = [number, guidance, class_name], {"api_visibility": "private"}
    sampler.input(None, [*about, sampler], count, js=widgets.with_data(SAMPLER, "MODEL", facts), **private)
    changed = [number.change, guidance.change, class_name.change, count.change]
    gr.on(changed, None, [*about, count], count, js=widgets.with_data(CLAMP, "MODEL", facts), **private)
    first = [one.value for one in inputs] if sheet else None
    pressed = widgets.next_seeds("generate", start.click, inputs, seed, count="settings[0]", first=first)
    events = [widgets.answer(one, generate, **options, **widgets.BUSY) for one in (pressed, *chosen)]
    for event in events:
        event.success(None, None, downloads, js=ENABLE, **private)
    stop.click(None, cancels=events, **private)
    widgets.mark_stale("generate", inputs, status, [pressed, *chosen], again="press Generate")
    return settings
