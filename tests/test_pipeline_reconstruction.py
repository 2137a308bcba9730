"""pipelines/reconstruction.py as users load it: on Gaussian data with a known ODE, and with an untrained UNet.

Where each pixel is N(0, s^2), x_t is N(0, a^2 s^2 + sigma^2) and the ODE keeps x_t / standard deviation: the latent of
an image x is x sqrt(a_T^2 s^2 + sigma_T^2) / s.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.sampling.samplers import draw, image_generators


CODE = str(ROOT / "pipelines/reconstruction.py")
STD = 0.5


class Gaussian(torch.nn.Module):
    """The exact prediction, of the scheduler's prediction type, for pixels N(0, STD^2)."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scheduler):
        super().__init__()
        self.alphas_cumprod, self.kind = scheduler.alphas_cumprod.double(), scheduler.config.prediction_type
        self.config = SimpleNamespace(in_channels=1, sample_size=4, block_out_channels=(8, 8), num_class_embeds=None)
        self.evaluations = 0

    def forward(self, x, timesteps, class_labels=None):
        self.evaluations += 1
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        epsilon, x_0 = sigma * x / variance, signal * STD**2 * x / variance
        output = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - sigma * x_0}[self.kind]
        return SimpleNamespace(sample=output.float())


def untrained(channels=1, num_class_embeds=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=num_class_embeds,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            add_attention=False,
            down_block_types=["DownBlock2D"] * 2,
            up_block_types=["UpBlock2D"] * 2,
        ).eval()


def cosine(scheduler_class=DDPMScheduler, prediction_type="v_prediction", **config):
    return scheduler_class(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, **config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What a user gets from a stock folder."""
    folder = tmp_path_factory.mktemp("tiny")
    DDPMPipeline(untrained(), cosine()).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=CODE, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(tiny, unet, scheduler, id2label=None):
    """The class that was loaded, with other parts."""
    pipeline = type(tiny)(unet, scheduler, id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gaussian(tiny, prediction_type="v_prediction"):
    scheduler = cosine(prediction_type=prediction_type)
    return make(tiny, Gaussian(scheduler), scheduler)


def pictures(count, size=8, channels=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_latents_of_gaussian_data(tiny, prediction_type):
    """With many steps the latent is the image over its standard deviation, and images come back at over 60 dB."""
    pipeline, images = gaussian(tiny, prediction_type), pictures(2, size=4)
    alpha_bar = pipeline.scheduler.alphas_cumprod[-1].item()
    exact = (2 * images - 1) * (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5 / STD
    errors = [(pipeline.invert(images, steps) - exact).abs().max().item() for steps in (50, 200, 1000)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5
    output = pipeline(images, num_inference_steps=100, output_type="pt")
    assert output.psnr.shape == (2,) and output.psnr.min() > 60
    error = (output.images - images).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.psnr, 10 * torch.log10(1 / error))


def test_evaluations_and_iterations(tiny):
    """S + 1 evaluations there and S back; each further iteration costs S and brings the image nearer."""
    pipeline, images = gaussian(tiny), pictures(1, size=4)
    psnr = []
    for iterations in (1, 2, 4):
        pipeline.unet.evaluations = 0
        output = pipeline(images, num_inference_steps=20, num_fixed_point_iterations=iterations, output_type="pt")
        psnr.append(output.psnr.item())
        assert pipeline.unet.evaluations == 1 + 20 * iterations + 20
    assert psnr[0] + 3 < psnr[1] and psnr[1] + 3 < psnr[2]


def test_roundtrip_of_an_untrained_unet(tiny):
    """Nothing about the data is needed; image k of a batch is image k alone, and no generator is touched."""
    images, before = pictures(3), torch.get_rng_state()
    output = tiny(images, num_inference_steps=30, num_fixed_point_iterations=2)
    assert output.psnr.min() > 40 and output.latents.shape == (3, 1, 8, 8)
    assert [image.mode for image in output.images] == ["L"] * 3
    assert abs(np.stack(output.images) / 255 - images[:, 0].numpy()).max() < 0.05
    alone = tiny(images[1], num_inference_steps=30, num_fixed_point_iterations=2)
    torch.testing.assert_close(alone.latents[0], output.latents[1], rtol=0, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_decoding_noise_is_ddim(tiny, prediction_type):
    """Standard normal latents give what our DDIM sampler draws without clipping, from any class of scheduler."""
    config = dict(prediction_type=prediction_type, num_train_timesteps=10)
    pipeline = make(tiny, untrained(), cosine(DDIMScheduler, **config))
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in image_generators(0, range(2))])
    images = pipeline.decode(noise, 3, output_type="pt").images
    ours = draw(
        pipeline.unet,
        cosine(PaperDDPMScheduler, **config),
        image_generators(0, range(2)),
        sampler="ddim",
        num_inference_steps=3,
        spacing="trailing",
        clip=False,
    )
    torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-4)


def test_slerp(tiny):
    """By hand in the plane; equal norms are kept, the ends are exact, parallel vectors are mixed."""
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(tiny.slerp(a, b, 1 / 3), torch.tensor([3 * 3**0.5 / 2, 1.5]))
    a, b = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    b = b * (a.norm() / b.norm())
    assert torch.equal(tiny.slerp(a, b, 0.0), a) and torch.equal(tiny.slerp(a, b, 1.0), b)
    for fraction in (0.2, 0.5, 0.9):
        torch.testing.assert_close(tiny.slerp(a, b, fraction).norm(), a.norm())
    torch.testing.assert_close(tiny.slerp(a, 3 * a, 0.5), 2 * a)


def test_interpolation(tiny):
    """From one reconstruction to the other; or between random latents, or from an image to one."""
    pipeline, images = gaussian(tiny), pictures(2, size=4)
    output = pipeline.interpolate(images[0], images[1], num_images=5, num_inference_steps=50, output_type="pt")
    assert output.images.shape == (5, 1, 4, 4) and output.latents.shape == (5, 1, 4, 4)
    assert (output.images[[0, 4]] - images).abs().max() < 0.01
    torch.testing.assert_close(output.latents[2:3], pipeline.slerp(output.latents[:1], output.latents[4:], 0.5))

    one = pipeline.interpolate(generator=torch.Generator().manual_seed(0), num_inference_steps=5).latents
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one[[0, 7]], noise)
    arguments = dict(num_images=2, num_inference_steps=5, generator=image_generators(0, [3, 4]))
    latents = pipeline.interpolate(image_b=images[1], **arguments).latents
    torch.testing.assert_close(latents[:1], torch.randn(1, 1, 4, 4, generator=image_generators(0, [3])[0]))
    torch.testing.assert_close(latents[1:], pipeline.invert(images[1], 5))


def test_outputs_and_callback(tiny):
    """Every output_type shows the same images; a callback's sample goes on; the last predicted x_0 is the image."""
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tensors, arrays, pils = (tiny.decode(latents, 3, output_type=kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_array_equal(arrays.images, tensors.images.permute(0, 2, 3, 1))
    np.testing.assert_array_equal(np.stack(pils.images), (arrays.images[..., 0] * 255).round())
    predicted = []
    watch = dict(
        callback_on_step_end=lambda pipeline, i, t, state: predicted.append(state["pred_original_sample"]),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    assert torch.equal(tiny.decode(latents, 3, output_type="pt", **watch).images, tensors.images)
    predicted = [(x_0 / 2 + 0.5).clamp(0, 1) for x_0 in predicted]
    assert len(predicted) == 3 and tensors.psnr is None and not torch.equal(predicted[0], tensors.images)
    torch.testing.assert_close(predicted[-1], tensors.images)

    seen = []

    def see(pipeline, i, t, state):
        seen.append((i, t, sorted(state)))
        return {"sample": torch.zeros_like(state["sample"])} if i == 2 else {}

    images, _, psnr = tiny(
        pictures(1), num_inference_steps=3, output_type="pt", return_dict=False, callback_on_step_end=see
    )
    assert seen == [(0, 999, ["sample"]), (1, 666, ["sample"]), (2, 332, ["sample"])] and (images == 0.5).all()
    torch.testing.assert_close(psnr[0], -10 * (pictures(1) - 0.5).square().mean().log10())


def test_images_of_all_kinds(tiny):
    """PIL, numpy and torch, one or many, uint8 or float, are the same image."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    expected = torch.from_numpy(levels)[:, None] / 255
    grey = [Image.fromarray(level) for level in levels]
    same = [grey, [image.convert("RGB") for image in grey], levels, levels[..., None], levels / 255]
    for images in [*same, torch.from_numpy(levels)[:, None], expected, expected.double()]:
        torch.testing.assert_close(tiny.preprocess(images), expected)
    for image in (grey[0], levels[0], levels[0][..., None], expected[0]):
        torch.testing.assert_close(tiny.preprocess(image), expected[:1])
    colour = make(tiny, untrained(channels=3), cosine())
    torch.testing.assert_close(colour.preprocess(grey), expected.expand(2, 3, 8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for image in (pixels, pixels[None], Image.fromarray(pixels)):
        torch.testing.assert_close(colour.preprocess(image), expected)


def test_class_labels(tiny):
    """None is the last of K+1 embeddings; a label changes the latents; without a null class one must be given."""
    unet, images = untrained(num_class_embeds=3), pictures(2)
    pipeline = make(tiny, unet, cosine(), {"0": "cat", "1": "dog"})
    arguments = dict(num_inference_steps=4)
    torch.testing.assert_close(pipeline.invert(images, **arguments), pipeline.invert(images, 4, class_labels=2))
    mixed = pipeline.invert(images, class_labels=[0, 1], **arguments)
    torch.testing.assert_close(mixed[1:], pipeline.invert(images[1], class_labels=1, **arguments), atol=1e-4, rtol=0)
    assert (mixed - pipeline.invert(images, **arguments)).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    for labels, words in (([0], "give one, or 2"), (3, "from 0 to 2"), (0.5, "from 0 to 2")):
        with pytest.raises(ValueError, match=words):
            pipeline.invert(images, class_labels=labels, **arguments)
    with pytest.raises(ValueError, match="takes class_labels from 0 to 2"):
        make(tiny, unet, cosine(), {0: "cat", 1: "dog", 2: "wild"}).invert(images, **arguments)
    with pytest.raises(ValueError, match="takes no class_labels"):
        tiny.invert(images, class_labels=0, **arguments)


def test_refusals(tiny):
    """Each is one sentence that says what was given and what is wanted."""
    good = pictures(1)
    coloured = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for image, words in (
        (coloured, "mode RGB; give image.convert.'L'."),
        (Image.new("RGBA", (8, 8)), "mode RGBA"),
        ([], "images of one size"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 6))], "images of one size"),
        (good.expand(1, 3, 8, 8), r"takes \(B, 1, H, W\)"),
        (good[..., :7], "multiples of 2"),
        (np.zeros(8), "batch of shape"),
        (2 * good, "finite floats in .0, 1."),
        (good * float("nan"), "finite floats in .0, 1."),
        (good.long(), "torch.int64 from 0 to 0; give uint8"),
        (np.full((8, 8), 300, dtype=np.uint16), "torch.uint16 from 300 to 300; give uint8"),
        ([good[0]], "A list holds .'Tensor'.; give PIL images"),
        (np.full((8, 8), "a"), "an array of <U1"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(image, num_inference_steps=2)
    for call, words in (
        (lambda: tiny(good, num_inference_steps=0), "from 1 to 1000"),
        (lambda: tiny(good, num_inference_steps=2, num_fixed_point_iterations=0), "give 1 or more"),
        (lambda: tiny(good, output_type="latent"), "'pil', 'np' or 'pt'"),
        (lambda: tiny(good, callback_on_step_end_tensor_inputs=["latents"]), "choose from 'sample'"),
        (lambda: tiny.decode(good[0]), r"give finite ones of shape \(B, 1, H, W\)"),
        (lambda: tiny.decode(good / 0), r"give finite ones of shape \(B, 1, H, W\)"),
        (lambda: tiny.decode(good.numpy()), "latents are a ndarray"),
        (lambda: tiny.decode(good[..., :7]), "multiples of 2"),
        (lambda: tiny.decode(pictures(3), 2, reference=good), r"shape \(1, 1, 8, 8\) and the latents \(3, 1, 8, 8\)"),
        (lambda: tiny.interpolate(num_images=1), "at least 2"),
        (lambda: tiny.interpolate(num_images=2.5), "num_images is 2.5"),
        (lambda: tiny.interpolate(generator=image_generators(0, [0])), "a list of 1 for 2 images"),
        (lambda: tiny.interpolate(good, pictures(2)), "one image each"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
