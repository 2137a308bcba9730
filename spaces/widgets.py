"""Build the parts of the page that several tabs share."""

from functools import partial

import gradio as gr
from checks import MAX_SEED
from images import SOURCES
from model import HERE, Model


STATUS = '<div class="status" role="status" aria-live="polite">${value}</div>'
GALLERY = """<div class="pictures" style="--columns: ${Math.max(1, Math.min(value.length, columns))}">
${value.map((one) => `<figure><a href="${one.image}" download="${one.caption}.png" title="Save"><img src="${one.image}"
alt="${one.caption}"></a><figcaption>${one.caption}</figcaption></figure>`).join("")}</div>"""
# Options of events. Gradio's preprocessing is off, because its errors are not written for visitors. The functions of
# the tabs check their inputs themselves. They have many positional parameters, because Gradio passes them by position.
BUSY = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
QUICK = {"preprocess": False, "concurrency_id": "quick", "concurrency_limit": 2, "show_progress": "hidden"}


def inputs_column() -> gr.Column:
    return gr.Column(min_width=280)


def outputs_column() -> gr.Column:
    return gr.Column(scale=2, min_width=300)


def two_buttons(first: str, second: str, primary: str) -> list[gr.Button]:
    """Return two buttons in a row. The one named `primary` is highlighted."""
    with gr.Row():
        variants = {name: "primary" if name == primary else "secondary" for name in (first, second)}
        return [gr.Button(name, variant=variant, min_width=90) for name, variant in variants.items()]


def seed_box() -> gr.Number:
    """Return a box for the seed, with a button that sets a random one."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, scale=3)
        another = gr.Button("Another", min_width=90, scale=1, size="sm")
    another.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})", api_visibility="private")
    return seed


def class_box(model: Model) -> gr.Dropdown:
    """Return a menu of the classes, hidden if the model has none."""
    return gr.Dropdown(model.classes, value=model.classes[0], label="Class", visible=bool(model.labels))


def status_line(value: str) -> gr.HTML:
    """Return the status line. Screen readers read it out when it changes."""
    return gr.HTML(value, html_template=STATUS, label="Status", js_on_load=None, apply_default_css=False)


def gallery(label: str, columns: int) -> gr.HTML:
    """Return a gallery of {image, caption}. Its pictures can change in place. A click saves a picture."""
    return gr.HTML([], html_template=GALLERY, label=label, js_on_load=None, apply_default_css=False, columns=columns)


def image_inputs(model: Model) -> list[gr.components.Component]:
    """Return the inputs [source, upload, drawing] for an image. The last two are visible only when chosen."""
    source = gr.Radio(SOURCES, value=SOURCES[0], label="Image")
    upload = gr.Image(
        label="Your image", type="filepath", sources=["upload", "clipboard"], height=240, visible="hidden"
    )
    drawing = gr.HTML(
        "",
        html_template=(HERE / "sketch.html").read_text(),
        js_on_load=(HERE / "sketch.js").read_text(),
        label="Drawing",
        visible="hidden",
        apply_default_css=False,
        colour=model.channels > 1,
        pen=round(280 * max(0.085, 1.1 / model.size[1])),
    )
    show = "(source) => ['Upload', 'Draw'].map((one) => ({ __type__: 'update', visible: one === source || 'hidden' }))"
    source.change(None, source, [upload, drawing], js=show, api_visibility="private")
    return [source, upload, drawing]


def answer(trigger, function, *, model: Model, inputs: list, outputs: list, **options):
    """Let an event call `function(model, *inputs)`, and return the event. In the API, it has the function's name.

    The second output is the status line. It says "Stopped." when the event fails; the reason is shown in a message of
    its own.

    Args:
        trigger: e.g. `button.click`.
        options: of the event, BUSY or QUICK and others.
    """
    event = trigger(partial(function, model), inputs, outputs, api_name=function.__name__, **options)
    event.failure(lambda: "Stopped.", None, outputs[1], queue=False, api_visibility="private")
    return event
