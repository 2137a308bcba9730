"""How it works: add the noise of a chosen timestep to an image, and show what the network predicts from it."""

from functools import partial

import gradio as gr
import widgets
from checks import MAX_SEED, whole
from images import UNFAMILIAR, is_visitors, picture, visitor_image
from model import Model


BAR = """<div class="bar" role="img" aria-label="${Math.round(value)} % image, the rest noise">
<span class="signal" style="width: ${value}%">image ${Math.round(value)} %</span>
<span class="noise" style="width: ${100 - value}%">noise ${100 - Math.round(value)} %</span></div>"""
HOW = """**Forward.** Step by step the image fades and noise is added, until only noise is left:
x<sub>t</sub> = √ᾱ<sub>t</sub> · x₀ + √(1 − ᾱ<sub>t</sub>) · noise. Move t and watch.

**The network** has learned one thing: to predict the clean image from a noisy one. The more noise there is, the more
it has to guess. From pure noise it invents an image.

**Backward.** Drawing starts from pure noise. In each step the network predicts the clean image, and a little of the
noise is removed. DDPM takes many small steps and adds some fresh noise in each. DDIM takes few large steps
and adds no noise."""


# Gradio passes these arguments by position. Its API uses their names.
def forward(model: Model, source, upload, drawing, t, seed):
    """Return (gallery, status, 100 alpha_bar).

    The gallery shows x_0, x_t and the x_0 that the network predicts from x_t. The page shows the number as the image's
    share of x_t, in percent.
    """
    t, seed = whole("t", t, 0, model.T), whole("seed", seed, 0, MAX_SEED)
    x_0 = visitor_image(model, source, upload, drawing, seed)
    x_t, alpha_bar = model.forward(x_0, t, seed + 1)  # seed + 1, because `seed` drew the model's own image
    shown = [picture(x_0, "Image x₀"), picture(x_t, f"Noisy, t = {t}")]
    if model.restoration is not None:  # the network can predict without a class
        shown.append(picture(model.guess(x_t, t) if t else x_0, "The network's guess"))
    hint = UNFAMILIAR if is_visitors(source) and model.is_unfamiliar(x_0) else ""
    return shown, f"x at t = {t} is √{alpha_bar:.4f} · x₀ + √{1 - alpha_bar:.4f} · noise.{hint}", 100 * alpha_bar


def add(model: Model) -> dict[str, gr.components.Component]:
    """Build the tab. Return the inputs that a link can set, as {name in the link: input}."""
    with gr.Tab("How it works", id="how_it_works") as tab:
        with gr.Row(elem_classes="sides"):
            with widgets.inputs_column():
                inputs, seed = widgets.image_inputs(model), widgets.seed_box()
            with widgets.outputs_column("how_it_works"):
                t = gr.Slider(0, model.T, value=model.T // 3, step=1, label="Timestep t")
                share = {"label": "Share of the image", "js_on_load": None, "apply_default_css": False}
                bar = gr.HTML(100, html_template=BAR, **share)
                status = widgets.status_line("One moment: the model draws a first image.")
                shown = widgets.gallery("Forward", columns=3)
                widgets.share_button("how_it_works", {"t": t, "seed": seed}, status)
        gr.Markdown(HOW)
        inputs, outputs = [*inputs, t, seed], [shown, status, bar]
        options = {
            "model": model,
            "inputs": inputs,
            "outputs": outputs,
            "trigger_mode": "always_last",
            **widgets.QUICK,
        }
        widgets.publish(forward, **options)
    triggers = [tab.select, *(part.change for part in inputs)]
    widgets.answer(partial(gr.on, triggers), forward, refused=([],), **options)
    return {"t": t, "seed": seed}
