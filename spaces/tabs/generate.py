"""Generate: draw images with a chosen sampler, steps, seed, class and guidance, show them form, and offer a zip."""

import html
import time

import gradio as gr
import widgets
from checks import MAX_IMAGES, MAX_SEED, Refused, between, one_of, plural, seconds_since, whole
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from images import bundle, picture, to_images
from model import NO_CLASS, SAMPLERS, Model


ENABLE = "() => ({ __type__: 'update', interactive: true })"


# Gradio passes these arguments by position. Its API uses their names.
def generate(model: Model, number, sampler, steps, seed, class_name, guidance):
    """Yield (gallery, status, zip). The gallery shows the predicted x_0 while drawing, and the images at the end."""
    number, steps = whole("number of images", number, 1, MAX_IMAGES), whole("steps", steps, 1, model.T)
    sampler, seed = one_of("sampler", sampler, SAMPLERS), whole("seed", seed, 0, MAX_SEED)
    class_name = one_of("class", class_name or model.classes[0], model.classes)
    guidance = between("guidance", 1 if guidance is None else guidance, 0, 10)
    if model.null_class is None or class_name == NO_CLASS:
        guidance = 1.0
    cost = number * steps * (1 if guidance == 1 else 2)
    if cost > model.max_evaluations:
        raise Refused(
            f"{number} images in {steps} steps need {cost:,} evaluations of the network, but one request may use "
            f"{model.max_evaluations:,}: take fewer steps or images{', or guidance 1' * (guidance != 1)}."
        )
    seeds, labels = [seed + k for k in range(number)], model.class_numbers(class_name, number)
    captions = [f"seed {one}" for one in seeds]
    if labels is not None:
        captions = [f"{html.escape(model.labels[label])} · {caption}" for label, caption in zip(labels, captions)]
    start, what = time.perf_counter(), f"{plural(number, 'image')}, {sampler}"
    yield gr.skip(), f"Starting {what}, {plural(steps, 'step')}.", gr.update(interactive=False)
    for i, x_0 in model.draw_frames(seeds, sampler, steps, labels, guidance):
        shown = [picture(image, caption) for image, caption in zip(to_images(x_0), captions)]
        if i < steps:
            yield shown, f"{what}: step {i} of {steps}.", gr.skip()
    settings = {
        "model": model.name,
        "sampler": sampler,
        "num_inference_steps": steps,
        "seeds": seeds,
        "class": class_name,
        "guidance_scale": guidance,
    }
    archive = bundle(to_images(x_0), seeds, settings)
    path = save_bytes_to_cache(archive, f"images_seed_{seed}.zip", get_upload_folder())
    yield shown, f"Done: {what}, {plural(steps, 'step')}, seed {seed}, in {seconds_since(start)}.", path


def add(model: Model):
    has_guidance = model.null_class is not None
    cost = 8 if has_guidance else 4  # evaluations per step of the default four images; guidance doubles them
    steps, many = model.affordable_steps(cost, 50), model.affordable_steps(cost, model.T)
    with gr.Tab("Generate"), gr.Row():
        with widgets.inputs_column():
            number = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images")
            sampler = gr.Radio(SAMPLERS, value="DDIM", label="Sampler", info="DDIM needs few steps, DDPM many")
            count = gr.Slider(1, model.T, value=steps, step=1, label="Steps")
            class_name = widgets.class_box(model)
            guidance = gr.Slider(
                0,
                10,
                value=2.0 if has_guidance else 1.0,
                step=0.5,
                label="Guidance",
                info="1: no guidance; more: clearer, but less varied",
                visible=has_guidance,
            )
            seed = widgets.seed_box()
            start, stop = widgets.two_buttons("Generate", "Stop", primary="Generate")
        with widgets.outputs_column():
            limit = f"Images x steps: at most {model.max_evaluations:,}{', half with guidance' * has_guidance}"
            status, shown = widgets.status_line(f"Ready. {limit}."), widgets.gallery("Images", columns=4)
            download = gr.DownloadButton("Download as zip", interactive=False)
    sampler.change(None, sampler, count, js=f"(one) => one === 'DDPM' ? {many} : {steps}", api_visibility="private")
    inputs, outputs = [number, sampler, count, seed, class_name, guidance], [shown, status, download]
    options = {"inputs": inputs, "outputs": outputs, "show_progress_on": status}
    event = widgets.answer(start.click, generate, model=model, **options, **widgets.BUSY)
    event.success(None, None, download, js=ENABLE, api_visibility="private")
    stop.click(None, cancels=[event], api_visibility="private")
