"""The Space draws the same images as the community pipelines, and refuses models that it cannot use."""

import base64
import json
import re
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from diffusers import DDIMPipeline, DDPMPipeline
from odd_server import OddServer
from PIL import Image
from space_server import pixels, png, save_model

from ddpm_hf.data.decode import to_array
from ddpm_hf.errors import UserError
from ddpm_hf.models.pretrained import load_pretrained


sys.path.insert(0, str(ROOT / "spaces"))

import model as of_space
import widgets
from checks import Refused, default_model
from images import contact_sheet, enlarge, read_image, to_images, to_tensor
from model import Model, open_model, shared_module
from tabs.compare import compare
from tabs.generate import captioned, generate
from tabs.how_it_works import forward
from tabs.restore import damages, degrade, restore


CLASSES = ("zero", "one", "<two>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def conditional(folder):
    return open_model(str(save_model(folder / "conditional", 10, CLASSES, prediction_type="v_prediction")))


def drawn(model, *arguments):
    *_, x_0 = model.draw(*arguments)
    return x_0


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("sampler, stock", [("DDPM", DDPMPipeline), ("DDIM", DDIMPipeline)])
def test_all_steps_draw_what_stock_diffusers_draws(folder, kind, sampler, stock):
    if not (path := folder / kind).exists():
        save_model(path, 10, variance_type=kind)
    if sampler == "DDIM" and kind == "learned_range":
        pytest.skip("stock DDIM cannot split the output")
    generators = [torch.Generator().manual_seed(7 + k) for k in range(2)]
    pipeline = stock.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    arrays = pipeline(2, generator=generators, num_inference_steps=10, output_type="np").images
    ours = drawn(open_model(str(path)), [7, 8], sampler, 10).clamp(-1, 1) / 2 + 0.5
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - arrays).max() < 1e-4


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
@pytest.mark.parametrize("steps, guidance", [(4, 1.0), (10, 1.0), (4, 3.0)])
def test_a_class_is_drawn_as_by_the_shared_module(conditional, sampler, steps, guidance):
    model = conditional
    pipeline = shared_module("class_guided").ClassGuidedPipeline(
        model.unet, model.scheduler, id2label=dict(enumerate(CLASSES))
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [2, 0],
        guidance,
        sampler.lower(),
        steps,
        output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    ours = drawn(model, [3, 4], sampler, steps, [2, 0], guidance).clamp(-1, 1) / 2 + 0.5
    assert (ours - theirs).abs().max() < 1e-4


def test_learned_variance_and_ddim(folder):
    model = open_model(str(save_model(folder / "learned", 10, variance_type="learned_range")))
    assert drawn(model, [0], "DDIM", 5).shape == (1, 1, 8, 8)


def test_classes_in_turn_one_class_and_none(conditional):
    assert conditional.classes == ["each class in turn", *CLASSES, "no class"]
    *_, (shown, *_) = generate(conditional, 4, "DDIM", 2, 0, "each class in turn", 1.0)
    names = ["zero, seed 0", "one, seed 1", "&lt;two&gt;, seed 2", "zero, seed 3"]  # no markup of a model's
    assert [one["caption"] for one in shown] == names
    numbered = SimpleNamespace(labels=["0", "1"])  # a bare number would not read as a class
    assert captioned(numbered, [Image.new("L", (2, 2))], [3], [1])[0]["caption"] == "class 1, seed 3"
    *_, (plain, *_) = generate(conditional, 1, "DDIM", 2, 0, "no class", 5.0)
    *_, (guided, *_) = generate(conditional, 1, "DDIM", 2, 0, "zero", 5.0)
    assert plain[0]["caption"] == "seed 0" and plain[0]["image"] != guided[0]["image"]


def test_a_request_is_bounded_and_guidance_counts_twice(conditional, monkeypatch):
    monkeypatch.setenv("DDPM_REQUEST_SECONDS", "0.0001")
    assert Model(conditional.name, None, conditional.pipeline).max_evaluations == 1
    monkeypatch.setattr(conditional, "max_evaluations", 8)
    assert next(generate(conditional, 4, "DDIM", 2, 0, "zero", 1.0))
    with pytest.raises(Refused, match="4 images in 2 steps need 16 evaluations .* may use 8: .* guidance 1"):
        next(generate(conditional, 4, "DDIM", 2, 0, "zero", 2.0))


def test_compare_takes_what_one_request_may_cost(conditional, monkeypatch):
    *_, (shown, _) = compare(conditional, 0, "", 1)
    assert [one["caption"].partition(", drawn in ")[0] for one in shown] == [
        "DDIM, 5 steps",
        "DDIM, 10 steps",
        "DDPM, 10 steps",
    ]
    assert pixels(shown[0]).shape == (324, 324)  # four images
    monkeypatch.setattr(conditional, "max_evaluations", 12)
    *_, (shown, _) = compare(conditional, 0, "", 1)
    assert pixels(shown[-1]).shape == (160, 160) and shown[-1]["caption"].startswith("DDPM, 7 steps")
    *_, (guided, _) = compare(conditional, 0, "", 2)  # two evaluations for each step
    assert [one["caption"].partition(", drawn in ")[0] for one in guided] == ["DDIM, 5 steps", "DDPM, 1 step"]


def test_compare_draws_with_the_guidance_of_generate(conditional):
    *_, (images, *_) = generate(conditional, 4, "DDIM", 5, 0, "one", 4.0)
    *_, (sheets, _) = compare(conditional, 0, "one", 4.0)
    *_, (plain, _) = compare(conditional, 0, "one", 1.0)
    enlarged = [enlarge(Image.fromarray(pixels(one))) for one in images]
    assert np.array_equal(pixels(sheets[0]), np.asarray(contact_sheet(enlarged, columns=2)))
    assert not np.array_equal(pixels(sheets[0]), pixels(plain[0]))


def test_a_conditional_model_restores_with_no_class(conditional):
    shown, status = restore(conditional, "The model's own", None, "", "Blur", "Medium", 1)
    assert len(shown) == 3 and re.search(r"[\d.]+ dB PSNR before", status)
    assert len(forward(conditional, "The model's own", None, "", 5, 1)[0]) == 3


def test_a_model_that_must_be_told_the_class_restores_nothing(folder):
    model = open_model(str(save_model(folder / "told", 10, CLASSES, has_null_class=False)))
    assert model.classes == ["each class in turn", *CLASSES]
    *_, (shown, status, *_) = generate(model, 2, "DDPM", 10, 0, "one", 4.0)
    assert len(shown) == 2 and status.startswith("Done")
    assert len(forward(model, "The model's own", None, "", 5, 0)[0]) == 2  # no guess
    with pytest.raises(Refused, match="always needs a class"):
        restore(model, "The model's own", None, "", "Blur", "Light", 0)


def test_a_colour_model_gets_its_colours_back(folder):
    model = open_model(str(save_model(folder / "colour", 10, channels=3)))
    assert "No colour" in damages(model)
    shown, _ = restore(model, "The model's own", None, "", "No colour", "Light", 0)
    original, grey, restored = map(pixels, shown)
    assert original.shape == grey.shape == restored.shape == (8, 8, 3)
    assert (grey == grey[..., :1]).all() and not (restored == restored[..., :1]).all()


def test_a_model_of_rectangles_fills_every_tab(folder):
    model = open_model(str(save_model(folder / "rectangle", 10, size=(8, 12))))
    canvas = "data:image/png;base64," + base64.b64encode(png(np.full((16, 16), 99, np.uint8))).decode()
    *_, (drawn_images, status, *_) = generate(model, 2, "DDIM", 10, 5, "", 1)
    assert status.startswith("Done")
    *_, (sheets, _) = compare(model, 5, "", 1)
    height, width = pixels(sheets[0]).shape[:2]
    assert abs(width / height - 12 / 8) < 0.1  # four images in two columns, with lines between them
    restored, _ = restore(model, "Draw", None, canvas, "Hole", "Light", 0)
    forwards, *_ = forward(model, "Draw", None, canvas, 5, 0)
    for picture in (*drawn_images, *restored, *forwards):
        assert pixels(picture).shape[:2] == (8, 12)


def test_an_image_that_the_model_cannot_have_learned_gets_a_hint(folder):
    """The network always predicts black, so black images are all that it knows."""
    save_model(folder / "black", 10, prediction_type="sample")
    model = open_model(str(folder / "black"))
    for parameter in model.unet.conv_out.parameters():
        parameter.zero_()
    model.unet.conv_out.bias.fill_(-1)
    assert not model.is_unfamiliar(torch.full((1, 1, 8, 8), -0.99)) and model.is_unfamiliar(torch.ones(1, 1, 8, 8))
    canvas = "data:image/png;base64," + base64.b64encode(png(np.full((8, 8), 255, np.uint8))).decode()
    for shown, status, *_ in (
        degrade(model, "Draw", None, canvas, "Noise", "Light", 0),
        restore(model, "Draw", None, canvas, "Noise", "Light", 0),
        forward(model, "Draw", None, canvas, 5, 0),
    ):
        assert shown and "nothing that this model has learned" in status
    assert "learned" not in degrade(model, "The model's own", None, "", "Noise", "Light", 0)[1]


def test_the_page_says_why_it_refuses_and_keeps_or_clears_its_pictures(conditional):
    def run(function, *inputs, refused=()):
        page = widgets._with_reason(partial(function, conditional), 5, refused)
        return list(page(*inputs))

    *_, (kept, why, *_) = run(generate, 99, "DDIM", 2, 0, "zero", 1.0)
    assert kept == gr.skip() and why == "The number of images is &#x27;99&#x27;: give a whole number from 1 to 16."
    ((cleared, why, *_),) = run(forward, "Draw", None, "", 5, 0, refused=([],))
    assert cleared == [] and why.startswith("Nothing is drawn yet")
    *_, (_, why, *_) = run(lambda model: 1 / 0)
    assert why == "The server failed, and logged the error: try again."


def test_without_a_name_the_model_of_the_examples_is_shown(tmp_path):
    assert default_model(tmp_path / "spaces") is None
    (tmp_path / "examples" / "mnist").mkdir(parents=True)
    (tmp_path / "examples" / "mnist" / "model_index.json").touch()
    assert default_model(tmp_path / "spaces") == str(tmp_path / "examples" / "mnist")


def test_what_shows_through_and_the_middle(tmp_path):
    image = Image.new("RGBA", (40, 20))  # nothing but transparency
    image.paste((255, 0, 0, 255), (15, 5, 25, 15))
    image.save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")
    grey, colour = (to_tensor(read, (20, 20), channels) for channels in (1, 3))
    assert grey.shape == (1, 1, 20, 20) and grey[0, 0, 0, 0] == 1
    trained = to_array(Image.open(tmp_path / "clear.png"), channels=1)[:, 10:30, 0]
    assert torch.equal(grey[0, 0], torch.from_numpy(trained.astype(np.float32) / 127.5 - 1))
    assert colour.shape == (1, 3, 20, 20) and (colour[0, :, 0, 0] == 1).all()
    assert colour[0, :, 10, 10].tolist() == [1, -1, -1]


def test_a_deep_image_that_would_be_black_is_mentioned(tmp_path):
    for name, white in (("twelve", 4095), ("sixteen", 65535)):
        Image.fromarray(np.array([[0, white]], np.uint16)).save(tmp_path / f"{name}.png")
        with warnings.catch_warnings(record=True) as said:  # gradio warns in this way outside of its server
            warnings.simplefilter("always")
            assert np.asarray(read_image(tmp_path / f"{name}.png")).max() == white // 257
        assert any(
            "The largest value in this image is 4095, but white is 65535" in str(one.message) for one in said
        ) == (name == "twelve")


def test_a_silent_hub_is_one_sentence_in_bounded_time(monkeypatch):
    server = OddServer(b"", 0.1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_requests = shared_module("hub_requests")
    hub_requests.ANSWER_SECONDS = 0.5
    hub_requests.API.endpoint = server.url
    monkeypatch.setattr(of_space, "shared_module", lambda name: hub_requests)
    started = time.perf_counter()
    with pytest.raises(Refused, match="no complete answer in 0 s"):
        open_model("me/silent")
    assert time.perf_counter() - started < 20


def test_no_model_is_one_sentence(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"')
    for name, why in ((tmp_path / "none", "neither a folder nor"), (tmp_path, "cannot be opened as a DDPM")):
        with pytest.raises(Refused, match=why) as error:
            open_model(str(name))
        assert "\n" not in str(error.value)
    with pytest.raises(Refused, match="cannot be opened as a DDPM"):
        open_model("nobody/nothing")


def test_an_export_that_names_a_pipeline_opens_without_its_code(conditional, folder):
    index = folder / "conditional" / "model_index.json"
    plain = index.read_text()
    index.write_text(json.dumps(json.loads(plain) | {"_class_name": ["class_guided", "ClassGuidedPipeline"]}))
    try:
        model = open_model(str(folder / "conditional"))
    finally:
        index.write_text(plain)
    assert model.labels == list(CLASSES)
    assert torch.equal(drawn(model, [7], "DDIM", 2, [1]), drawn(conditional, [7], "DDIM", 2, [1]))


def only_pickles(model):
    """Replace the UNet's safetensors by a pickle of the same weights."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def an_index_of_pickles(model):
    only_pickles(model)
    pickle = model / "unet" / "diffusion_pytorch_model.bin"
    names = dict.fromkeys(torch.load(pickle, weights_only=True), pickle.name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    pickle.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil", [only_pickles, an_index_of_pickles])
def test_pickles_are_refused(folder, spoil):
    spoil(path := save_model(folder / spoil.__name__, 10))
    for named in (False, True):
        index = json.loads((path / "model_index.json").read_text())
        index["_class_name"] = ["class_guided", "ClassGuidedPipeline"] if named else "DDPMPipeline"
        (path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(Refused, match="safetensors") as error:
            open_model(str(path))
        assert "\n" not in str(error.value)


def test_the_package_refuses_an_index_of_pickles_too(folder):
    an_index_of_pickles(path := save_model(folder / "sharded", 10))
    with pytest.raises(UserError, match="index.json names files that are not safetensors: give"):
        load_pretrained(path)


def edited(part, **values):
    """Return a function that changes the config of a part of a saved model."""

    def edit(model):
        (path,) = (model / part).glob("*config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def not_a_number(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path)


UNUSABLE = {
    "T of text": edited("scheduler", num_train_timesteps="ten"),
    "T of zero": edited("scheduler", num_train_timesteps=0),
    "T without end": edited("scheduler", num_train_timesteps=10**12),
    "T of a fraction": edited("scheduler", num_train_timesteps=2.5),
    "betas of text": edited("scheduler", trained_betas=["a", "b"]),
    "unknown prediction": edited("scheduler", prediction_type="guess"),
    "unknown schedule": edited("scheduler", beta_schedule="steep"),
    "T in a list": edited("scheduler", num_train_timesteps=[10]),
    "size of text": edited("unet", sample_size="8"),
    "size of zero": edited("unet", sample_size=0),
    "size below zero": edited("unet", sample_size=-8),
    "size of one in a list": edited("unet", sample_size=[8]),
    "size without end": edited("unet", sample_size=10**6),
    "size that the levels do not divide": edited("unet", sample_size=7),
    "two channels": edited("unet", in_channels=2),
    "other channels out": edited("unet", out_channels=4),
    "layers without end": edited("unet", layers_per_block=10**5),
    "no levels": edited("unet", block_out_channels=[]),
    "groups of zero": edited("unet", norm_num_groups=0),
    "groups of text": edited("unet", norm_num_groups="four"),
    "an index that is a list": lambda model: (model / "model_index.json").write_text("[]"),
    "an index without a class": lambda model: (model / "model_index.json").write_text("{}"),
    "a deep index": lambda model: (model / "model_index.json").write_text("[" * 10**5),
    "weights that are not numbers": not_a_number,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_model_that_cannot_draw_is_refused_in_one_sentence(folder, name):
    path = save_model(folder / name, 10)
    UNUSABLE[name](path)
    with pytest.raises(Refused) as error:
        open_model(str(path))
    assert "\n" not in str(error.value) and re.search(": (give|add) ", str(error.value)), error.value


@pytest.mark.parametrize("pixel", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite_are_not_shown(pixel):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 2] = pixel
    with pytest.raises(Refused, match="pixels that are nan or infinite"):
        to_images(images)
