"""Turn a visitor's file or drawing into a tensor, and tensors into PNGs, sheets and a zip."""

import base64
import binascii
import io
import json
import math
import zipfile

import gradio as gr
import numpy as np
import torch
from checks import Refused, one_of
from PIL import Image, ImageOps
from uploads import open_upload


SOURCES = ("The model's own", "Upload", "Draw")
UNFAMILIAR = " The image looks like nothing that this model has learned, so expect a poor result."
MAX_PIXELS = 16_000_000
DARK = 0.25  # a 16-bit image whose largest value is below this share of white is almost black
MAX_DRAWING = 2_000_000  # characters; the canvas of the page sends about 10,000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow refuses any file with more than twice as many


def visitor_image(model, source, upload, drawing, seed: int) -> torch.Tensor:
    """Return the visitor's image at the model's size: (1, C, H, W) in [-1, 1]."""
    source = one_of("source", source, SOURCES)
    if source == SOURCES[0]:
        return model.example(seed)
    if source == "Draw":
        return to_tensor(read_drawing(drawing), model.size, model.channels)
    with open_upload(upload) as file:
        return to_tensor(read_image(file), model.size, model.channels)


def is_visitors(source) -> bool:
    """Return whether the image of a source comes from the visitor, not from the model."""
    return source != SOURCES[0]


def read_image(file) -> Image.Image:
    """Return the first frame of an image file, upright, as L, RGB or RGBA.

    Raises:
        Refused: for a file that is not an image, and for a large image.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                return _as_8_bit(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        width, height = "too many", "too many"
    except Exception as error:  # Pillow's decoders may raise anything for a broken file
        raise Refused("This file cannot be read as an image: give a PNG, JPEG, WebP, GIF, BMP or TIFF.") from error
    raise Refused(f"This image has {width} x {height} pixels: give one of at most {MAX_PIXELS // 10**6} million.")


def _as_8_bit(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 255 stands for 65535 in 16-bit images, else for the largest value
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        top = 65535 if image.mode.startswith("I;16") else max(values.max(), 1)
        if values.max() < top * DARK:
            gr.Warning(
                f"The largest value in this image is {values.max():.0f}, but white is {top}, so it is almost black. "
                "Scale its values first."
            )
        return Image.fromarray((255 * values / top).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def read_drawing(data_url: str | None) -> Image.Image:
    """Return the drawing in a data URL: a PNG, from the canvas of the page. Raise Refused for an empty canvas."""
    head, _, body = (data_url if isinstance(data_url, str) else "").partition(",")
    if not body:
        raise Refused("Nothing is drawn yet: draw something, or choose another source.")
    if head != "data:image/png;base64" or len(body) > MAX_DRAWING:
        raise Refused(f"This is not a drawing: send a PNG as a base64 data URL of at most {MAX_DRAWING:,} characters.")
    try:
        return read_image(io.BytesIO(base64.b64decode(body, validate=True)))
    except binascii.Error as error:
        raise Refused("The drawing is not valid base64: draw again.") from error


def to_tensor(image: Image.Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Crop an image to its middle and resize it to (1, C, H, W) in [-1, 1]. Transparent parts become white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), size[::-1], Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32).reshape(*size, channels)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def to_images(x: torch.Tensor) -> list[Image.Image]:
    """Return 8-bit images of a tensor (B, C, H, W) in [-1, 1], clipped to that range.

    Raises:
        Refused: if a pixel is nan or infinite, because it would become black or white.
    """
    if not x.isfinite().all():
        raise Refused("The model drew pixels that are nan or infinite: take another seed or sampler, or more steps.")
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]


def enlarge(image: Image.Image, side: int = 160) -> Image.Image:
    """Repeat the pixels of an image until its longer side is at least `side`."""
    factor = max(1, math.ceil(side / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def contact_sheet(images: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Return a sheet of images of equal size, row by row on white."""
    (width, height), rows = images[0].size, math.ceil(len(images) / columns)
    sheet = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def animation(frames: list[list[Image.Image]], columns: int) -> bytes:
    """Return a looping GIF that shows its last frame for 2 s. A frame shows a list of images of equal size."""
    sheets = [contact_sheet([thumbnail(image) for image in images], columns) for images in frames]
    buffer = io.BytesIO()
    more = {"duration": [100] * (len(sheets) - 1) + [2000], "loop": 0, "optimize": True}
    sheets[0].save(buffer, "GIF", save_all=True, append_images=sheets[1:], **more)
    return buffer.getvalue()


def thumbnail(image: Image.Image, side: int = 96) -> Image.Image:
    """Return an image enlarged by a whole factor or reduced, so that its longer side is about `side`."""
    if max(image.size) <= side:
        return enlarge(image, side)
    return image.reduce(math.ceil(max(image.size) / side))


def picture(image, caption: str) -> dict[str, str]:
    """Return {image, caption} for a gallery. The image or tensor (1, C, H, W) becomes a data URL with a PNG."""
    image = to_images(image)[0] if isinstance(image, torch.Tensor) else image
    return {"image": "data:image/png;base64," + base64.b64encode(png(image)).decode(), "caption": caption}


def as_large(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a small or grey image in the shape of `like`, by repeating its pixels and channels."""
    factor = like.shape[-1] // x.shape[-1]
    return x.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2).expand_as(like).cpu()


def enlarged_sheet(images: list[Image.Image]) -> bytes:
    """Return a PNG of all images, enlarged to at least 160 pixels each, in about as many rows as columns."""
    return png(contact_sheet([enlarge(image) for image in images], columns=math.ceil(len(images) ** 0.5)))


def bundle(images: list[Image.Image], seeds: list[int], sheet: bytes, settings: dict) -> bytes:
    """Return a zip with the images, the enlarged sheet of them, and the settings to draw them again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sheet.png", sheet)
        for seed, image in zip(seeds, images):
            archive.writestr(f"seed_{seed}.png", png(image))
        archive.writestr("settings.json", json.dumps(settings, indent=2) + "\n")
    return buffer.getvalue()


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the PSNR in dB of two tensors in [-1, 1]. It is inf for equal tensors."""
    error = ((x.clamp(-1, 1) - y.clamp(-1, 1)) / 2).square().mean().item()
    return 10 * math.log10(1 / error) if error else math.inf
