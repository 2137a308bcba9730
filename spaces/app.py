"""Serve a page that draws images with a DDPM, compares samplers, restores images and shows how a DDPM works.

    DDPM_MODEL=runs/digits python spaces/app.py

DDPM_MODEL is the folder or the Hub id of a pipeline in diffusers' format. If DDPM_MODEL is not set, the page uses
examples/mnist, which must then be beside the folder of this file. DDPM_REQUEST_SECONDS is how long one request may
take; default: 60. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT are the address of the page.
"""

import atexit
import html
import os
import shutil
import sys
from pathlib import Path

import uploads
from checks import Refused, default_model, request_seconds


MODEL = os.environ.get("DDPM_MODEL") or default_model(Path(__file__).resolve().parent)
if not MODEL:  # checked before the imports below, because they take seconds
    print("DDPM_MODEL is not set: give a model, e.g. DDPM_MODEL=runs/digits python spaces/app.py.", file=sys.stderr)
    sys.exit(2)
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")
if not (PORT.isdecimal() and 0 < int(PORT) < 65536):  # gradio reads it when it is imported
    print(f"GRADIO_SERVER_PORT is {PORT!r}: give a whole number from 1 to 65535.", file=sys.stderr)
    sys.exit(2)
try:
    request_seconds()
except Refused as error:
    print(error, file=sys.stderr)
    sys.exit(2)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
UPLOADS = uploads.make_folder()
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

import gradio as gr  # noqa: E402
import widgets  # noqa: E402
from connections import bounded_body, close_half_sent  # noqa: E402
from model import HERE, Model, open_model  # noqa: E402
from starlette.concurrency import run_in_threadpool  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402
from tabs import compare, generate, how_it_works, restore  # noqa: E402


TABS = [generate, compare, restore, how_it_works]
QUEUE_SIZE = 20
MAX_BODY = 12_000_000  # bytes: the largest upload, 10 MB, and the rest of its request
SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]


# Every pair of colours below has the contrast that WCAG 2.2 AA asks for, at least 4.5, in light and dark pages.
THEME = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONT, font_mono=["monospace"]).set(
    block_title_background_fill="transparent",
    block_title_text_color="*body_text_color",
    block_title_padding="0",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_label_background_fill="*background_fill_primary",
    block_label_background_fill_dark="*background_fill_primary",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_background_fill="*neutral_50",
    body_text_color="*neutral_900",
    body_text_color_dark="*neutral_100",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    slider_color="*primary_700",
    slider_color_dark="*primary_300",
    button_border_width="1px",
    button_secondary_border_color="*border_color_primary",
    button_secondary_text_color="*neutral_800",
    button_secondary_text_color_dark="*neutral_100",
    button_secondary_background_fill_hover="*neutral_100",
    button_secondary_background_fill_hover_dark="*neutral_700",
    button_secondary_text_color_hover="*neutral_900",
    button_secondary_text_color_hover_dark="white",
    checkbox_label_background_fill_hover="*neutral_100",
    checkbox_label_background_fill_hover_dark="*neutral_700",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_400",
    checkbox_background_color_selected="*primary_700",
    checkbox_background_color_selected_dark="*primary_700",
    checkbox_border_color_selected="*primary_700",
    checkbox_border_color_selected_dark="*primary_300",
    input_border_color="*neutral_500",
    input_border_color_dark="*neutral_400",
    checkbox_label_border_width="1px",
    checkbox_label_text_color="*neutral_800",
    checkbox_label_text_color_dark="*neutral_100",
    checkbox_label_text_color_selected="*neutral_900",
    checkbox_label_text_color_selected_dark="*neutral_50",
    checkbox_label_background_fill_selected="*primary_100",
    checkbox_label_background_fill_selected_dark="*primary_900",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
    link_text_color_hover="*primary_800",
    link_text_color_hover_dark="*primary_200",
    link_text_color_visited="*primary_700",
    link_text_color_visited_dark="*primary_300",
)


class Page(gr.Blocks):
    """Blocks that report every failure to the visitor in one sentence. Details of unexpected failures are logged."""

    async def process_api(self, *args, **kwargs):
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            title = "Not possible" if isinstance(error, (Refused, ValueError)) else "Error"
            raise gr.Error(widgets.reason(error), title=title, print_exception=False) from error


class BoundedRequests:
    """ASGI middleware that bounds the size and the duration of requests, and the disk space of uploads.

    It refuses requests of more than MAX_BODY bytes, also if they do not announce their length, and requests that do
    not arrive in time. Before it answers an upload, it deletes the oldest uploads if their total size is too large.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if int(dict(scope.get("headers", [])).get(b"content-length", 0)) > MAX_BODY:
            what = f"The request is larger than {MAX_BODY // 10**6} MB: send a smaller file."
            await JSONResponse({"detail": what}, status_code=413)(scope, receive, send)
        else:
            is_upload = scope.get("path", "").rstrip("/").endswith("/upload")

            async def answer(message):
                if is_upload and message["type"] == "http.response.start":
                    await run_in_threadpool(uploads.delete_oldest, UPLOADS)
                await send(message)

            try:
                await self.app(scope, bounded_body(receive, MAX_BODY) if scope["type"] == "http" else receive, answer)
            finally:  # also after an interrupted upload, because a part of it is on the disk
                if is_upload:
                    await run_in_threadpool(uploads.delete_oldest, UPLOADS)


def head(model: Model) -> str:
    """Return HTML with the model's name and facts. The name of a model on the Hub is a link."""
    name, (height, width) = html.escape(model.name), model.size
    title = f'<a href="{model.url}" target="_blank" rel="noopener">{name}</a>' if model.url else name
    facts = [
        f"{height} x {width} pixels, {'grey' if model.channels == 1 else 'colour'}",
        f"T = {model.T:,} timesteps",
        f"{sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6:.1f} M parameters",
        f"{len(model.labels)} classes" if model.labels else "no classes",
    ]
    return f"<h1>Images from noise</h1><p>Model <b>{title}</b>: {' · '.join(facts)}</p>"


def build(model: Model) -> Page:
    """Return the whole page. Gradio deletes the files made for visitors after half an hour."""
    title = f"{model.name}: images from noise"
    with Page(title=title, analytics_enabled=False, delete_cache=(300, 1800)) as page:
        gr.HTML(head(model), elem_classes="head", apply_default_css=False)
        with gr.Tabs() as tabs:
            settings = {tab.__name__.rpartition(".")[2]: tab.add(model) or {} for tab in TABS}
        widgets.restore_from_link(page, tabs, settings, highest={"steps": model.T})
    return page.queue(
        max_size=QUEUE_SIZE, default_concurrency_limit=1, api_open=False
    )  # with an open API, /run/ would skip the queue


def main():
    try:
        page = build(open_model(MODEL))
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # a model from elsewhere may hold anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(
            f"DDPM_MODEL is {MODEL!r}, but the page cannot be built ({reason}): give another model.", file=sys.stderr
        )
        sys.exit(2)
    try:
        page.launch(
            theme=THEME,
            css_paths=HERE / "page.css",
            max_file_size="10mb",
            state_session_capacity=200,
            app_kwargs={"middleware": [Middleware(BoundedRequests)]},
            ssr_mode=False,
            footer_links=["api", "gradio"],
            prevent_thread_lock=True,
        )
    except OSError:  # gradio tried 100 ports
        name = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
        where = f"GRADIO_SERVER_NAME {name}, GRADIO_SERVER_PORT {PORT} or the ports after it"
        print(
            f"The page cannot be served at {where}: give an address of this machine and a free port.", file=sys.stderr
        )
        sys.exit(2)
    close_half_sent(page.server)
    page.block_thread()


if __name__ == "__main__":
    main()
