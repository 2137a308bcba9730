"""pipelines/restoration.py against linear algebra, and for a prior with a known posterior."""

import math
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT, untrained_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddpm_hf.community_pipelines import pipeline_module


FILE = str(ROOT / "pipelines" / "restoration.py")
T = 50


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact v of data N(mean, s^2 I) in [-1, 1], between timesteps too: what no training can better."""

    @register_to_config
    def __init__(self, in_channels=1, out_channels=1, s=0.3, mean=0, num_class_embeds=None, down_block_types=(1, 2)):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2")
        self.labels = None

    def forward(self, x, t, class_labels=None):
        self.labels = class_labels
        log_snr = self.scheduler.alphas_cumprod.double().logit()
        a = torch.from_numpy(np.interp(t.double(), np.arange(T), log_snr)).sigmoid()[:, None, None, None]
        mean, variance = self.config.mean, self.config.s**2
        x0 = mean + a.sqrt() * variance / (a * variance + 1 - a) * (x - a.sqrt() * mean)
        v = (a.sqrt() * x - x0) / (1 - a).sqrt()
        return UNet2DOutput(sample=torch.cat([v, 0 * v], dim=1).float()[:, : self.config.out_channels])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock pipeline, its UNet tiny and untrained."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(path)
    return path


def load(folder, **parts):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=FILE, trust_remote_code=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def gaussian(folder, clip_sample=False, id2label=None, **config):
    """The pipeline with the exact model."""
    scheduler = DDPMScheduler(
        T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=clip_sample
    )
    return load(folder, unet=GaussianUNet(**config), scheduler=scheduler, id2label=id2label)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def operators(pipe):
    """Name -> (apply, solve, the shape they apply to)."""
    module = sys.modules[type(pipe).__module__]
    keep = (torch.rand(1, 1, 4, 4, generator=seeded()) < 0.5).float()
    return {
        "mask": (*module.mean_operator(keep.mul, keep.mul), (2, 4, 4)),
        "blocks": (*module.OPERATORS["super_resolution"](None, (1, 2, 4, 4), scale_factor=2), (2, 4, 4)),
        "channels": (*module.OPERATORS["colorize"](None, (1, 3, 4, 4)), (3, 4, 4)),
        "blur": (*module.OPERATORS["deblur"](None, (1, 1, 4, 6), blur_sigma=0.7, device="cpu"), (1, 4, 6)),
    }


@pytest.mark.parametrize("name", ["mask", "blocks", "channels", "blur"])
def test_operators_are_the_dense_matrices_that_they_stand_for(pipe, name):
    apply, solve, shape = operators(pipe)[name]
    basis = torch.eye(math.prod(shape)).reshape(-1, *shape)
    A = apply(basis).flatten(1).T.double()  # column k is A e_k
    x = torch.randn(1, *shape, generator=seeded(1))
    y = apply(x)
    torch.testing.assert_close(apply(solve(y, 0)), y, atol=1e-4, rtol=1e-4)
    r = torch.randn(y.shape, generator=seeded(2))
    for lam in (0.01, 1.0):
        dense = A.T @ torch.linalg.solve(A @ A.T + lam * torch.eye(len(A)).double(), r.flatten().double())
        torch.testing.assert_close(solve(r, lam).flatten().double(), dense, atol=1e-5, rtol=1e-4)
    # lam large: A^T r / lam, the adjoint.
    torch.testing.assert_close((apply(x) * r).sum(), (x * solve(r, 1e4) * 1e4).sum(), atol=1e-3, rtol=1e-3)


def test_degrade_is_what_the_words_say(pipe):
    image = torch.rand(2, 3, 8, 12, generator=seeded())
    close = torch.testing.assert_close
    blurred = scipy.ndimage.gaussian_filter(image.numpy(), (0, 0, 1.5, 1.5), mode="reflect", truncate=4)
    close(pipe.degrade(image, "deblur", blur_sigma=1.5), torch.from_numpy(blurred), atol=2e-5, rtol=0)
    blocks = image.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
    close(pipe.degrade(image, "super_resolution"), blocks)
    close(pipe.degrade(image, "colorize"), image.mean(dim=1, keepdim=True))
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:, :6] = True
    hidden = pipe.degrade(image, "inpaint", mask=mask)
    close(hidden[..., 6:], image[..., 6:])
    assert (hidden[..., :6] == 0.5).all()
    noisy = pipe.degrade(torch.full((1, 3, 64, 64), 0.9), "denoise", noise_level=0.2, generator=seeded())
    assert abs(noisy.std() - 0.2) < 0.01 and noisy.max() > 1.2
    close(pipe.degrade(image, "denoise"), image)


def test_denoise_is_the_posterior_mean(folder):
    pipe = gaussian(folder, s=0.4)
    y = 0.5 + 0.2 * torch.randn(2, 1, 8, 8, generator=seeded())
    levels = [0.05, 0.3]
    output = pipe(y, "denoise", noise_level=levels, output_type="pt")
    sigma = 2 * torch.tensor(levels)[:, None, None, None]
    expected = ((2 * y - 1) * 0.16 / (0.16 + sigma**2) + 1) / 2
    torch.testing.assert_close(output.images, expected.clamp(0, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.noise_levels, torch.tensor(levels))


def test_walking_denoises_to_the_posterior_too(folder):
    """DDPM's steps draw from N(mean, s^2 sigma^2 / (s^2 + sigma^2))."""
    pipe = gaussian(folder, s=0.4)
    y = torch.full((1, 1, 8, 8), 0.7)
    arguments = dict(noise_level=0.2, num_inference_steps=25, output_type="pt", generator=seeded())
    means = [pipe(y, "denoise", num_samples=n, **arguments).images for n in (1, 64)]
    assert abs(means[1].mean() - 0.6) < 0.005
    assert 0.6 < means[0].std() / math.sqrt(0.16**2 / 0.32) * 2 < 1.3


@pytest.mark.parametrize("steps", [1, 10, 25, T])
def test_faint_noise_is_removed_in_any_number_of_steps(folder, steps):
    """Near t = -1 float32 rounds 1 - alphas_cumprod to 0, which must not be a divisor."""
    pipe = gaussian(folder, s=0.4)
    y = 0.7 + 0.02 * torch.randn(4, 1, 4, 4, generator=seeded())
    levels = [0, 0.002, 0.02, 0.1]
    arguments = dict(noise_level=levels, num_inference_steps=steps, num_samples=64, generator=seeded())
    restored = pipe(y, "denoise", **arguments, output_type="pt").images
    expected, sigma = 2 * y - 1, 2 * torch.tensor(levels).clamp(min=2e-3)[:, None, None, None]
    expected = (expected * 0.16 / (0.16 + sigma**2) + 1) / 2
    assert ((restored - expected).abs() <= 0.3 * sigma + 1e-3).all()
    estimated = pipe(y[:1].round(decimals=3), "denoise", num_inference_steps=steps, output_type="pt").images
    assert estimated.isfinite().all()


def test_restorations_of_gaussian_data_have_the_posterior_mean(folder):
    """With white data, what is known shrinks to the mean by s^2 / (s^2 + sigma^2), and what is not is the mean."""
    pipe = gaussian(folder, s=1.0)
    y = torch.linspace(0.3, 0.7, 64).reshape(1, 1, 8, 8)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    output = pipe(y, "inpaint", mask=mask, noise_level=0.2, num_samples=400, generator=seeded(), output_type="pt")
    expected = 0.5 + (y - 0.5) / (1 + 0.4**2)
    expected[..., :4, :] = 0.5
    assert (output.images - expected).abs().mean() < 0.03


@pytest.mark.parametrize("task, low, high", [("inpaint", 0.4, 0.6), ("denoise", 0.8, 1.0)])
def test_restorations_vary_as_the_docstring_says(folder, task, low, high):
    """The posterior of white data has the variance s^2 sigma^2 / (s^2 + sigma^2)."""
    pipe, y = gaussian(folder, s=0.4), torch.full((300, 1, 4, 4), 0.6)
    options = {"mask": torch.zeros(4, 4)} if task == "inpaint" else {}
    options |= dict(noise_level=0.15, num_inference_steps=25, num_samples=1, generator=seeded(), output_type="pt")
    variance = (2 * pipe(y, task, **options).images).var() / (0.16 * 0.09 / 0.25)
    assert low < variance < high


@pytest.mark.parametrize("task", ["inpaint", "super_resolution", "colorize", "deblur"])
def test_noise_free_restorations_agree_with_what_was_given(pipe, task):
    image = 0.3 + 0.4 * torch.rand(1, 3, 8, 8, generator=seeded())
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    y = pipe.degrade(image, task, mask=mask, blur_sigma=0.5)
    seen = []

    def keep(pipe, i, t, tensors):
        seen.append(tensors["pred_original_sample"])
        return {}

    pipe(
        y,
        task,
        mask=mask,
        blur_sigma=0.5,
        noise_level=0,
        num_inference_steps=3,
        num_samples=1,
        generator=seeded(),
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    keep = pipe._kept(task, mask, 1, 8, 8)
    operator = sys.modules[type(pipe).__module__].OPERATORS[task]
    apply, _ = operator(keep, (1, 3, 8, 8), scale_factor=2, blur_sigma=0.5, device="cpu")
    assert len(seen) == 3
    torch.testing.assert_close(
        apply(seen[-1]), apply(2 * y - 1) if task == "inpaint" else 2 * y - 1, atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5])
def test_noise_estimate(folder, sigma, clip):
    """A black image: of what 8 bits keep, half of the noise is cut off."""
    pipe = gaussian(folder, s=0.02, mean=-1.0)
    noisy = sigma * torch.randn(4, 1, 32, 32, generator=seeded())
    estimate = pipe.estimate_noise(noisy.clamp(0, 1) if clip else noisy.clamp(-3, 4))
    assert estimate.shape == (4,)
    assert (estimate / sigma - 1).abs().max() < 0.1
    torch.testing.assert_close(
        pipe.estimate_noise(noisy[1:2].clamp(0, 1)), pipe.estimate_noise(noisy.clamp(0, 1))[1:2]
    )


def test_clipped_noise_biases_denoising_no_longer(folder):
    pipe = gaussian(folder, s=0.15, mean=-0.8)
    noisy = 0.1 + 0.25 * torch.randn(1, 1, 32, 32, generator=seeded())
    full, cut = (pipe(v, "denoise", noise_level=0.25, output_type="pt").images for v in (noisy, noisy.clamp(0, 1)))
    naive = pipe(noisy.clamp(0, 1.0) - 1e-6, "denoise", noise_level=0.25, output_type="pt").images  # nothing at 0
    assert abs(cut.mean() - full.mean()) < 0.25 * abs(naive.mean() - full.mean())


def test_images_alone_and_in_a_batch_are_the_same(pipe):
    images = torch.rand(3, 3, 8, 8, generator=seeded())
    arguments = dict(num_inference_steps=2, num_samples=2, output_type="pt", scale_factor=2)
    batch = pipe(images, "super_resolution", generator=[seeded(k) for k in range(3)], **arguments).images
    alone = [pipe(images[k], "super_resolution", generator=[seeded(k)], **arguments).images for k in range(3)]
    torch.testing.assert_close(batch, torch.cat(alone), atol=1e-5, rtol=0)
    one = pipe(images[:1], "super_resolution", generator=seeded(0), **arguments).images
    torch.testing.assert_close(one, alone[0])


def test_every_form_of_an_image_is_the_same_image(pipe):
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    forms = [array, array / 255, array[:, ::-1].copy()[:, ::-1], (array / 255).astype(">f8")]
    forms += [tensor, tensor / 255, [Image.fromarray(one) for one in array], [array[0], tensor[1]]]
    y = [pipe(form, "denoise", noise_level=0.1, output_type="pt").images for form in forms]
    for other in y[1:]:
        torch.testing.assert_close(other, y[0], atol=1e-5, rtol=0)
    pixels = pipe(array, "denoise", noise_level=0.1, output_type="np").images
    np.testing.assert_allclose(pixels, y[0].permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = pipe(array, "denoise", noise_level=0.1).images
    assert pil[0].mode == "RGB" and (np.asarray(pil[1]) == np.round(pixels[1] * 255)).all()
    grey = Image.fromarray(array[0, ..., 0])
    colours = pipe(grey, "colorize", num_inference_steps=1).images[0]
    assert colours.mode == "RGB" and colours.size == (8, 8)
    masks = [np.eye(8), np.eye(8, dtype=bool), torch.eye(8), torch.eye(8, dtype=torch.uint8), np.eye(8)[None]]
    masks += [Image.fromarray(np.uint8(255 * np.eye(8))), [torch.eye(8)] * 2]
    hidden = [pipe.degrade(array, "inpaint", mask=mask) for mask in masks]
    assert all((other == hidden[0]).all() for other in hidden) and (hidden[0][..., 3, 3] == 0.5).all()


@pytest.mark.parametrize("task", ["denoise", "super_resolution"])
def test_a_unet_with_a_table_of_timesteps(task):
    """Its table has only whole timesteps, and denoising starts between two of them."""
    unet = untrained_unet(8, channels=3, time_embedding_type="learned", num_train_timesteps=50)
    pipe = pipeline_module("restoration").RestorationPipeline(unet, DDPMScheduler(50))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    assert pipe(image, task, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_callback_and_tuple(pipe):
    image = torch.rand(2, 3, 8, 8, generator=seeded())
    arguments = dict(noise_level=0.2, num_inference_steps=3, num_samples=2, generator=seeded())
    steps = []

    def black(pipe, i, t, tensors):
        steps.append((i, t.shape, sorted(tensors)))
        return {"sample": tensors["sample"] * 0 - 1}

    output = pipe(image, "denoise", callback_on_step_end=black, output_type="pt", **arguments)
    assert steps == [(i, (4,), ["sample"]) for i in range(3)]
    assert (output.images == 0).all()
    images, levels = pipe(image, "denoise", return_dict=False, **arguments)
    assert len(images) == 2 and levels.tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_prediction_types_and_learned_variance(folder, prediction_type):
    """The exact model in other words gives the same images; a second half of the channels is left alone."""
    wanted = gaussian(folder, s=0.4)
    pipe = gaussian(folder, s=0.4, out_channels=2)
    pipe.scheduler.register_to_config(prediction_type=prediction_type)
    forward = pipe.unet.forward

    def reworded(x, t):
        a = wanted.unet.scheduler.alphas_cumprod[t.long()][:, None, None, None]
        v = forward(x, t).sample[:, :1]
        words = {"epsilon": (1 - a).sqrt() * x + a.sqrt() * v, "sample": a.sqrt() * x - (1 - a).sqrt() * v}
        return UNet2DOutput(sample=torch.cat([words[prediction_type], v], dim=1))

    pipe.unet.forward = reworded
    arguments = dict(num_inference_steps=5, num_samples=1, output_type="pt")
    y = torch.rand(1, 1, 4, 4, generator=seeded())
    images = [each(y, "super_resolution", generator=seeded(), **arguments).images for each in (pipe, wanted)]
    torch.testing.assert_close(*images, atol=1e-3, rtol=0)


def test_null_class(folder):
    names = {k: str(k) for k in range(10)}
    pipe = gaussian(folder, num_class_embeds=11, id2label=names)
    pipe(torch.rand(2, 1, 8, 8), "denoise", noise_level=0.1)
    assert pipe.unet.labels.tolist() == [10, 10]
    with pytest.raises(ValueError, match="null class"):
        gaussian(folder, num_class_embeds=10, id2label=names).estimate_noise(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="null class"):
        gaussian(folder, num_class_embeds=10, id2label=names)(torch.rand(2, 1, 8, 8), "denoise", noise_level=0.1)


GOOD = torch.full((1, 3, 8, 8), 0.5)
REFUSALS = [
    (GOOD, "sharpen", {}, "task is 'sharpen'"),
    (GOOD, "super_resolution", {"scale_factor": 0}, "scale_factor is 0"),
    (GOOD, "deblur", {"blur_sigma": -1.0}, "blur_sigma is -1"),
    (GOOD * 255, "denoise", {}, "divide by 255"),
    (GOOD + 0.6, "deblur", {}, "out of range"),
    (GOOD * math.nan, "denoise", {}, "out of range"),
    (GOOD + 3, "denoise", {"noise_level": 0.1}, "out of range"),
    (GOOD[:, :1], "denoise", {}, "3 channel"),
    (GOOD, "colorize", {}, "1 channel"),
    (Image.new("RGB", (8, 8), "red"), "colorize", {}, "1 channel"),
    (Image.new("RGBA", (8, 8)), "denoise", {}, "mode RGBA"),
    ("image.png", "denoise", {}, "give a PIL image"),
    ([GOOD, GOOD[..., :6]], "denoise", {}, "one size"),
    (GOOD[..., :7], "denoise", {}, "multiples of 2"),
    (
        GOOD[..., :7],
        "super_resolution",
        {"scale_factor": 3},
        "24x21; give one whose height and width are multiples of 2",
    ),
    (GOOD, "super_resolution", {"scale_factor": True}, "scale_factor is True"),
    (GOOD[:0], "denoise", {}, "3 channel"),
    (GOOD.numpy().astype(object), "denoise", {}, "an array of object"),
    (GOOD, "inpaint", {}, "inpaint needs a mask"),
    (GOOD, "inpaint", {"mask": np.ones((8, 7))}, "mask"),
    (GOOD, "inpaint", {"mask": np.ones((2, 8, 8))}, "mask"),
    (GOOD, "denoise", {"noise_level": -0.1}, "noise_level is -0.1"),
    (GOOD, "denoise", {"noise_level": [0.1, 0.2]}, "one for each of 1"),
    (GOOD, "denoise", {"num_inference_steps": 51}, "from 1 to 50"),
    (GOOD, "denoise", {"num_samples": 0}, "num_samples is 0"),
    (GOOD, "denoise", {"eta": 2}, "eta is 2"),
    (GOOD, "denoise", {"generator": [seeded(), seeded()]}, "list of 2"),
    (GOOD, "denoise", {"output_type": "latent"}, "output_type is 'latent'"),
    (GOOD, "denoise", {"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
]


@pytest.mark.parametrize("image, task, arguments, message", REFUSALS, ids=[row[-1] for row in REFUSALS])
def test_refusals(pipe, image, task, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(image, task, **arguments)


@pytest.mark.parametrize("mask", [None, torch.full((8, 8), math.nan), -torch.ones(8, 8)])
def test_masks_that_mean_nothing_are_refused(folder, mask):
    with pytest.raises(ValueError, match="mask"):
        gaussian(folder)(torch.rand(1, 1, 8, 8), "inpaint", mask=mask)


def test_each_mask_has_its_own_white(folder):
    """A mask of 0 and 0.4 hides the same alone and beside one of 0 and 1."""
    pipe, dark = gaussian(folder), torch.zeros(1, 1, 8, 8)
    dark[..., :4] = 0.4
    both = pipe.degrade(torch.zeros(2, 1, 8, 8), "inpaint", mask=torch.cat([dark, (dark > 0).float()]))
    assert torch.equal(both[0], both[1]) and both[0, 0, 0].tolist() == [0.5] * 4 + [0.0] * 4
