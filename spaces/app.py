"""A page on which anyone draws with a DDPM, compares samplers, mends images and sees how it works.

    DDPM_MODEL=runs/digits python spaces/app.py

DDPM_MODEL is the folder or the Hub id of a pipeline in diffusers' format; a class-conditional one has classes and
guidance. DDPM_REQUEST_SECONDS (60) says how long one request may keep this machine busy. GRADIO_SERVER_NAME and
GRADIO_SERVER_PORT say where it listens.
"""

import html
import logging
import os
import sys


MODEL = os.environ.get("DDPM_MODEL")
if not MODEL:  # said at once, the imports below take their time
    print("DDPM_MODEL is not set: DDPM_MODEL=runs/digits python spaces/app.py opens that folder.", file=sys.stderr)
    sys.exit(2)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402
from actions import MAX_IMAGES, MAX_SEED, SOURCES, STRENGTHS, Actions  # noqa: E402
from model import HERE, SAMPLERS, Refused, open_model  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402


QUEUE_SIZE = 20
STOPPED = "Stopped before it was done: by you, or for the reason that a message gave."
MAX_BODY = 12_000_000  # bytes: an upload and what is around it
SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
logger = logging.getLogger("ddpm_hf.space")


class Page(gr.Blocks):
    """Blocks whose every failure is a sentence for the visitor; what nobody foresaw is logged here, not shown."""

    async def process_api(self, *args, **kwargs):
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error:
            raise
        except Refused as error:
            raise gr.Error(html.escape(str(error)), title="Not possible", print_exception=False) from error
        except ValueError as error:
            logger.exception("Sent by a visitor")
            what = "What was sent is not what this page sends: reload it, and check numbers, choices and files."
            raise gr.Error(what, title="Not possible", print_exception=False) from error
        except Exception as error:
            logger.exception("A failure of the Space")
            what = "Something failed on the server, which has noted it: try again."
            raise gr.Error(what, print_exception=False) from error


class BoundedRequests:
    """ASGI middleware: a request of more than MAX_BODY bytes is refused, whether it says so or not."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        received = 0

        async def bounded_receive():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= MAX_BODY else {"type": "http.disconnect"}

        if int(dict(scope.get("headers", [])).get(b"content-length", 0)) > MAX_BODY:
            what = f"This request is larger than {MAX_BODY // 10**6} MB: send less."
            await JSONResponse({"detail": what}, status_code=413)(scope, receive, send)
        else:
            await self.app(scope, bounded_receive, send)


STATUS = '<div class="status" role="status" aria-live="polite">${value}</div>'
BAR = """<div class="bar" role="img" aria-label="${Math.round(value)} % image, the rest noise">
<span class="signal" style="width: ${value}%">image ${Math.round(value)} %</span>
<span class="noise" style="width: ${100 - value}%">noise ${100 - Math.round(value)} %</span></div>"""
GALLERY = """<div class="pictures" style="--columns: ${Math.max(1, Math.min(value.length, columns))}">
${value.map((one) => `<figure><a href="${one.image}" download="${one.caption}.png" title="Save"><img src="${one.image}"
alt="${one.caption}"></a><figcaption>${one.caption}</figcaption></figure>`).join("")}</div>"""
ENABLE = "() => ({ __type__: 'update', interactive: true })"
HOW = """**Forward.** The image is faded and noise is added, step by step, until only noise is left:
x<sub>t</sub> = √ᾱ<sub>t</sub> · x₀ + √(1 − ᾱ<sub>t</sub>) · noise. Move t and watch.

**The network** has learned one thing: to tell the clean image from a noisy one. The more noise, the more it guesses,
and at the end what it sees is its own.

**Backward.** Drawing begins with pure noise. Each step asks the network what it sees, and takes a little of the
noise away. DDPM takes many small steps and adds some fresh noise in each; DDIM takes few large ones without."""
# Without gradio's preprocessing, whose failures are no sentences: the actions check all that is sent by themselves.
BUSY = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
QUICK = {"preprocess": False, "concurrency_id": "quick", "concurrency_limit": 2, "show_progress": "hidden"}


def head(model) -> str:
    """Name and facts of the model, its link where it has one."""
    name, (height, width) = html.escape(model.name), model.size
    title = f'<a href="{model.url}" target="_blank" rel="noopener">{name}</a>' if model.url else name
    facts = [
        f"{height} x {width} pixels, {'grey' if model.channels == 1 else 'colour'}",
        f"T = {model.T:,} timesteps",
        f"{sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6:.1f} M parameters",
        f"{len(model.labels)} classes" if model.labels else "no classes",
    ]
    return f"<h1>Images from noise</h1><p>Model <b>{title}</b>: {' · '.join(facts)}</p>"


def seed_box() -> gr.Number:
    """A seed, and a button for another one."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, scale=3)
        another = gr.Button("Another", min_width=90, scale=1, size="sm")
    another.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})", api_visibility="private")
    return seed


def class_box(actions) -> gr.Dropdown:
    """The class, hidden where the model knows none."""
    return gr.Dropdown(actions.classes, value=actions.classes[0], label="Class", visible=bool(actions.model.labels))


def status_line(value: str) -> gr.HTML:
    """What the Space is doing, read out where a screen reader is."""
    return gr.HTML(value, html_template=STATUS, label="Status", js_on_load=None, apply_default_css=False)


def gallery(label: str, columns: int) -> gr.HTML:
    """A list of {image, caption}: pictures that change in place while they form; a click saves one."""
    return gr.HTML([], html_template=GALLERY, label=label, js_on_load=None, apply_default_css=False, columns=columns)


def image_inputs(model) -> list[gr.components.Component]:
    """Where an image comes from: [source, upload, drawing], of which the last two show when chosen."""
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


def generate_tab(actions):
    """Number, sampler, steps, seed, class and guidance; the images form; a zip."""
    model = actions.model
    cost = 4 * (2 if model.null_class is not None else 1)  # of a step of the defaults: guidance doubles it
    steps = actions.affordable_steps(cost, 50)
    with gr.Row():
        with gr.Column(min_width=280):
            number = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images")
            sampler = gr.Radio(SAMPLERS, value="DDIM", label="Sampler", info="DDIM is quick, DDPM as in training")
            count = gr.Slider(1, model.T, value=steps, step=1, label="Steps")
            class_name = class_box(actions)
            guidance = gr.Slider(
                0, 10, value=1.0 if model.null_class is None else 2.0, step=0.5, label="Guidance",
                info="1 is none; more is clearer and less varied", visible=model.null_class is not None,
            )  # fmt: skip
            seed = seed_box()
            with gr.Row():
                start, stop = gr.Button("Generate", variant="primary", min_width=90), gr.Button("Stop", min_width=90)
        with gr.Column(scale=2, min_width=300):
            limit = f"Images x steps may be {actions.max_evaluations:,} here"
            status = status_line(f"Ready. {limit}{', half with guidance' * (model.null_class is not None)}.")
            shown = gallery("Images", columns=4)
            download = gr.DownloadButton("Download as zip", interactive=False)
    many = actions.affordable_steps(cost, model.T)
    sampler.change(None, sampler, count, js=f"(one) => one === 'DDPM' ? {many} : {steps}", api_visibility="private")
    inputs = [number, sampler, count, seed, class_name, guidance]
    event = start.click(
        actions.generate, inputs, [shown, status, download], api_name="generate", show_progress_on=status, **BUSY
    )
    event.success(None, None, download, js=ENABLE, api_visibility="private")
    stop.click(None, cancels=[event], api_visibility="private")
    say_failure(event, status)


def compare_tab(actions):
    """One seed by every sampler."""
    with gr.Row():
        with gr.Column(min_width=280):
            gr.Markdown("The same noise, drawn with DDIM in 5, 10, 20 and 50 steps and with DDPM.")
            class_name, seed = class_box(actions), seed_box()
            with gr.Row():
                start, stop = gr.Button("Compare", variant="primary", min_width=90), gr.Button("Stop", min_width=90)
        with gr.Column(scale=2, min_width=300):
            status, shown = status_line("Ready."), gallery("Samplers", columns=3)
    event = start.click(
        actions.compare, [seed, class_name], [shown, status], api_name="compare", show_progress_on=status, **BUSY
    )
    stop.click(None, cancels=[event], api_visibility="private")
    say_failure(event, status)


def restore_tab(actions):
    """An image, damaged and mended."""
    if actions.pipeline is None:
        gr.Markdown("This model draws only images of a class; restoring needs one that need not be told which.")
        return
    with gr.Row():
        with gr.Column(min_width=280):
            inputs = image_inputs(actions.model)
            damage = gr.Radio(actions.damages, value="Hole", label="Damage")
            strength = gr.Radio(STRENGTHS, value="Medium", label="Strength")
            seed = seed_box()
            with gr.Row():
                degrade = gr.Button("Damage", min_width=90)
                restore = gr.Button("Restore", variant="primary", min_width=90)
        with gr.Column(scale=2, min_width=300):
            status = status_line("Ready. Take the model's own image, upload one or draw one.")
            shown = gallery("Before and after", columns=3)
    inputs, outputs = [*inputs, damage, strength, seed], [shown, status]
    quick = {**QUICK, "show_progress": "minimal"}
    for button, action, name, kind in (
        (degrade, actions.degrade, "degrade", quick),
        (restore, actions.restore, "restore", BUSY),
    ):
        say_failure(button.click(action, inputs, outputs, api_name=name, show_progress_on=status, **kind), status)


def how_tab(actions, tab):
    """The forward process of the visitor's image, on a slider."""
    with gr.Row():
        with gr.Column(min_width=280):
            inputs = image_inputs(actions.model)
            seed = seed_box()
        with gr.Column(scale=2, min_width=300):
            t = gr.Slider(0, actions.model.T, value=actions.model.T // 3, step=1, label="Timestep t")
            bar = gr.HTML(100, html_template=BAR, label="Share of the image", js_on_load=None, apply_default_css=False)
            status, shown = status_line("One moment: an image to begin with."), gallery("Forward", columns=3)
    gr.Markdown(HOW)
    inputs, outputs = [*inputs, t, seed], [shown, status, bar]
    triggers = [tab.select, *(part.change for part in inputs)]
    event = gr.on(triggers, actions.forward, inputs, outputs, api_name="forward", trigger_mode="always_last", **QUICK)
    say_failure(event, status)


def say_failure(event, status):
    """Say in the status that nothing more comes: it was stopped, or a message says why."""
    event.failure(lambda: STOPPED, None, status, queue=False, api_visibility="private")


def build(actions) -> Page:
    """The whole page, its files forgotten after half an hour."""
    with Page(
        title=f"{actions.model.name}: images from noise", analytics_enabled=False, delete_cache=(300, 1800)
    ) as page:
        gr.HTML(head(actions.model), elem_classes="head", apply_default_css=False)
        with gr.Tab("Generate"):
            generate_tab(actions)
        with gr.Tab("Compare"):
            compare_tab(actions)
        with gr.Tab("Restore"):
            restore_tab(actions)
        with gr.Tab("How it works") as tab:
            how_tab(actions, tab)
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)


def main():
    try:
        actions = Actions(open_model(MODEL))
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONT, font_mono=["monospace"]).set(
        block_title_background_fill="transparent",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        body_background_fill="*neutral_50",
        checkbox_label_border_width="1px",
        button_border_width="1px",
        button_secondary_border_color="*border_color_primary",
    )
    build(actions).launch(
        theme=theme,
        css_paths=HERE / "page.css",
        max_file_size="10mb",
        state_session_capacity=200,
        app_kwargs={"middleware": [Middleware(BoundedRequests)]},
        ssr_mode=False,
        footer_links=["api", "gradio"],
    )


if __name__ == "__main__":
    main()
