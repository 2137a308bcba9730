"""Build the parts of the page that several tabs share."""

import functools
import html
import inspect
import json
import logging
from functools import partial

import gradio as gr
from checks import MAX_GUIDANCE, MAX_SEED, Refused
from images import SOURCES
from model import HERE, Model


logger = logging.getLogger("ddpm_hf.space")
STATUS = '<div class="status" role="status" aria-live="polite">${value}</div>'
GALLERY = """<div class="pictures" style="--columns: ${Math.max(1, Math.min(value.length, columns))}">
${value.map((one) => `<figure><a href="${one.image}" download="${one.caption}.png" title="Save"><img src="${one.image}"
alt="${one.caption}"></a><figcaption>${one.caption}</figcaption></figure>`).join("")}</div>"""
# Options of events. Gradio's preprocessing is off, because its errors are not written for visitors. The functions of
# the tabs check their inputs themselves. They have many positional parameters, because Gradio passes them by position.
BUSY = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
QUICK = {"preprocess": False, "concurrency_id": "quick", "concurrency_limit": 2, "show_progress": "hidden"}
# A click shows the results, on a phone by scrolling to them, and stores the settings that they are drawn with.
SHOW = """(...settings) => {
    const results = document.getElementById("results-NAME");
    results.dataset.drawn = JSON.stringify(settings);
    delete results.dataset.stale;
    if (window.innerWidth < 700) results.scrollIntoView({ block: "start" });
}"""
# A press of the button draws with the settings on the page. If these are drawn already, the seed first goes on to the
# next ones, unless the visitor has typed it. FIRST are the settings of the images that the page opens with.
NEXT = """(...settings) => {
    const results = document.getElementById("results-NAME"), seed = settings[PLACE];
    const drawn = results.dataset.drawn ?? JSON.stringify(FIRST);
    if ("typed" in results.dataset || drawn !== JSON.stringify(settings)) return seed;
    return seed + COUNT > MAX_SEED ? 0 : seed + COUNT;
}"""
STALE = """(...settings) => {
    const results = document.getElementById("results-NAME"), status = results.querySelector(".status").innerHTML;
    if (results.dataset.drawn === JSON.stringify(settings)) {
        delete results.dataset.stale;
        return status;
    }
    results.dataset.stale = "";
    return "The settings have changed: AGAIN.";
}"""
LINK = """(...values) => {
    const url = new URL(window.location), settings = new URLSearchParams({ tab: "NAME" });
    KEYS.forEach((key, k) => { if (values[k] !== null && values[k] !== "") settings.set(key, values[k]); });
    url.search = settings;
    window.history.replaceState(null, "", url);
    if (navigator.clipboard) navigator.clipboard.writeText(url.href).catch(() => {});
    return `A link to these settings, also in the address bar: <a href="${url.href}">${settings}</a>`;
}"""
RESTORE = """() => {
    const given = new URLSearchParams(window.location.search), tabs = SETTINGS, tab = given.get("tab");
    const value = (name, about) => {
        const text = given.get(name);
        if (text === null || text === "") return undefined;
        if (about.choices) return about.choices.includes(text) ? text : undefined;
        const number = Number(text);
        return Number.isFinite(number) ? Math.min(about.high, Math.max(about.low, number)) : undefined;
    };
    const updates = [{ __type__: "update", ...(tab in tabs ? { selected: tab } : {}) }];
    for (const [name, settings] of Object.entries(tabs))
        for (const [key, about] of Object.entries(settings)) {
            const one = name === tab ? value(key, about) : undefined;
            updates.push({ __type__: "update", ...(one === undefined ? {} : { value: one }) });
        }
    return updates;
}"""


def inputs_column() -> gr.Column:
    return gr.Column(min_width=280, elem_classes="inputs")


def outputs_column(name: str) -> gr.Column:
    """Return the column of a tab's results. On a phone it is above the inputs."""
    return gr.Column(scale=2, min_width=300, elem_id=f"results-{name}", elem_classes="results")


def two_buttons(first: str, second: str, primary: str) -> list[gr.Button]:
    """Return two buttons in a row. The one named `primary` is highlighted. On a phone they are above the inputs."""
    with gr.Row(elem_classes="buttons"):
        variants = {name: "primary" if name == primary else "secondary" for name in (first, second)}
        return [gr.Button(name, variant=variant, min_width=90) for name, variant in variants.items()]


def seed_box(name: str | None = None) -> gr.Number:
    """Return a box for the seed, with a button that sets a random one.

    Args:
        name: the name of the tab, if its main button changes the seed, see `next_seeds`. None: it does not.
    """
    info = None if name is None else "each press takes the next seeds, but keeps a seed that you typed"
    with gr.Row(elem_classes="seed"):
        limits = dict(precision=0, minimum=0, maximum=MAX_SEED)
        seed = gr.Number(0, label="Seed", info=info, min_width=120, scale=3, **limits)
        dice = gr.Button("Another", min_width=90, scale=1, size="sm")
    results = f'document.getElementById("results-{name}")'
    forget = f"delete {results}.dataset.typed;" if name is not None else ""
    js = f"() => {{ {forget} return Math.floor(Math.random() * {MAX_SEED}); }}"
    dice.click(None, None, seed, js=js, api_visibility="private")
    if name is not None:
        seed.input(None, None, None, js=f'() => {{ {results}.dataset.typed = ""; }}', api_visibility="private")
    return seed


def next_seeds(name: str, trigger, inputs: list, seed: gr.Number, *, count: str, first: list | None = None):
    """At each `trigger`, advance the seed by `count` if the images of the current settings are already drawn.

    Return a trigger that fires after this. Draw the images at this trigger, so that they use the new seed.

    Args:
        count: a JavaScript expression. In it, `settings` is the list of the values of the inputs.
        first: the values of the inputs for the images that the page opens with. None: the page opens without images.
    """
    js = NEXT.replace("NAME", name).replace("PLACE", str(inputs.index(seed))).replace("COUNT", f"({count})")
    js = with_data(js.replace("MAX_SEED", str(MAX_SEED)), "FIRST", first)
    return trigger(None, inputs, seed, js=js, api_visibility="private").then


def class_box(model: Model) -> gr.Dropdown:
    """Return a menu of the classes, hidden if the model has none."""
    return gr.Dropdown(model.classes, value=model.classes[0], label="Class", visible=bool(model.labels))


def guidance_slider(model: Model) -> gr.Slider:
    """Return a slider of the guidance scale, hidden if the model cannot be guided."""
    options = {"step": 0.5, "label": "Guidance", "info": "1: no guidance; more: clearer, but less varied"}
    return gr.Slider(0, MAX_GUIDANCE, value=model.first_guidance, visible=model.null_class is not None, **options)


def status_line(value: str) -> gr.HTML:
    """Return the status line. Screen readers read it out when it changes."""
    return gr.HTML(value, html_template=STATUS, label="Status", js_on_load=None, apply_default_css=False)


def gallery(label: str, columns: int, value: list | None = None) -> gr.HTML:
    """Return a gallery of {image, caption}. Its pictures can change in place. A click saves a picture."""
    look = {"js_on_load": None, "apply_default_css": False, "columns": columns}
    return gr.HTML(value or [], html_template=GALLERY, label=label, **look)


def image_inputs(model: Model) -> list[gr.components.Component]:
    """Return the inputs [source, upload, drawing] for an image. The last two are visible only when chosen."""
    source = gr.Radio(SOURCES, value=SOURCES[0], label="Image")
    upload = gr.Image(
        label="Your image", type="filepath", sources=["upload", "clipboard"], height=240, visible="hidden"
    )
    drawing = gr.HTML(
        "",
        html_template=(HERE / "sketch.html").read_text(encoding="utf-8"),
        js_on_load=(HERE / "sketch.js").read_text(encoding="utf-8"),
        label="Drawing",
        visible="hidden",
        apply_default_css=False,
        colour=model.channels > 1,
        pen=round(280 * max(0.085, 1.1 / model.size[1])),
    )
    show = "(source) => ['Upload', 'Draw'].map((one) => ({ __type__: 'update', visible: one === source || 'hidden' }))"
    source.change(None, source, [upload, drawing], js=show, api_visibility="private")
    return [source, upload, drawing]


def example_buttons(examples: dict[str, list], inputs: list) -> list:
    """Add a row of buttons, one for each example. A click sets the inputs to the values of the example.

    Return each button's `then`, with which to add what follows a click.
    """
    gr.Markdown("Try one of these:", elem_classes="try")
    events = []
    with gr.Row(elem_classes="examples"):
        for name, values in examples.items():
            button = gr.Button(name, size="sm", min_width=90)
            event = button.click(None, None, inputs, js=f"() => {json.dumps(values)}", api_visibility="private")
            events.append(event.then)
    return events


def share_button(name: str, settings: dict[str, gr.components.Component], status: gr.HTML):
    """Add a button that puts a link to a tab's settings into the status line, the address bar and the clipboard."""
    button = gr.Button("Link to these settings", size="sm")
    js = with_data(LINK.replace("NAME", name), "KEYS", list(settings))
    button.click(None, list(settings.values()), status, js=js, api_visibility="private")


def restore_from_link(page: gr.Blocks, tabs: gr.Tabs, settings: dict[str, dict], highest: dict[str, int]):
    """Open the tab that a link names, with its settings, when the page loads.

    A value out of range becomes the nearest bound. The server checks all values again.

    Args:
        settings: for each tab, by its name, the dict that its `add` returned.
        highest: the upper bound of a setting, by its name, if its slider has a lower maximum when the page loads.
    """
    about = {
        name: {key: _range(one, highest.get(key)) for key, one in part.items()} for name, part in settings.items()
    }
    outputs = [tabs, *(one for part in settings.values() for one in part.values())]
    page.load(None, None, outputs, js=with_data(RESTORE, "SETTINGS", about), api_visibility="private")


def _range(component, highest: int | None) -> dict:
    """Return the values that a link may give to a component: {"choices": ...}, or {"low": ..., "high": ...}."""
    if isinstance(component, (gr.Radio, gr.Dropdown)):
        return {"choices": [value for _, value in component.choices]}
    return {"low": component.minimum, "high": highest or component.maximum}


def with_data(js: str, name: str, data) -> str:
    """Return the JavaScript with `data` as JSON in place of `name`."""
    return js.replace(name, json.dumps(data))


def mark_stale(name: str, inputs: list, status: gr.HTML, triggers: list, *, again: str):
    """Mark the results of a tab as old while its inputs are not those that the results were drawn with.

    The events `triggers` draw new results. `again` tells a visitor how, e.g. "press Compare".
    """
    changes = [one.input if hasattr(one, "input") and not isinstance(one, gr.Number) else one.change for one in inputs]
    js = STALE.replace("NAME", name).replace("AGAIN", again)
    gr.on(changes, None, inputs, status, js=js, api_visibility="private")
    for trigger in triggers:
        trigger(None, inputs, None, js=SHOW.replace("NAME", name), api_visibility="private")


def publish(function, *, model: Model, inputs: list, outputs: list, **options):
    """Offer `function(model, *inputs)` in the API, under the name of the function.

    If the function refuses, the caller gets an error. The event belongs to a hidden button, because gradio needs a
    component for an event.
    """
    event = gr.Button(visible=False).click
    event(partial(function, model), inputs, outputs, api_name=function.__name__, **options)


def answer(trigger, function, *, model: Model, inputs: list, outputs: list, refused: tuple = (), **options):
    """Let an event of the page call `function(model, *inputs)`, and return the event.

    The second output must be the status line. If the function refuses or fails, the status line says why. No message
    is shown over the page then, because a message would cover the results.

    Args:
        trigger: e.g. `button.click`.
        refused: values for the first outputs if the function refuses or fails. All other outputs keep their values.
        options: more options of the event, such as BUSY or QUICK.
    """
    page = _with_reason(partial(function, model), len(outputs), refused)
    event = trigger(page, inputs, outputs, api_visibility="private", **options)
    event.failure(lambda: "Stopped.", None, outputs[1], queue=False, api_visibility="private")
    return event


def _with_reason(function, count: int, refused: tuple):
    """Return a generator function that yields what `function` returns or yields, or the reason why it failed."""

    @functools.wraps(function)  # gradio looks for a gr.Progress() in the signature
    def page(*inputs):
        try:
            result = function(*inputs)
            if inspect.isgenerator(result):
                yield from result
            else:
                yield result
        except Exception as error:
            values = [*refused, *[gr.skip()] * (count - len(refused))]
            values[1] = reason(error)
            yield tuple(values)

    return page


def reason(error: Exception) -> str:
    """Return one sentence in HTML that tells a visitor why something failed. Log every error but Refused."""
    if isinstance(error, Refused):
        return html.escape(str(error))
    if isinstance(error, ValueError):
        logger.exception("Invalid input from a visitor")
        return "The request is not valid: reload the page, and check numbers, choices and files."
    logger.exception("The Space failed")
    return "The server failed, and logged the error: try again."
