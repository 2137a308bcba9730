"""The samplers against stock pipelines with the same generators, and on a Gaussian with a known answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import model_of
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from torch import nn

from ddpm_hf import UserError
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.pictures import to_pil, to_uint8
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.samplers import draw, image_generators
from ddpm_hf.sampling.settings import Sampler


def tiny_unet(in_channels=1, out_channels=1, **config):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=out_channels,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **config,
    )
    return unet.eval()


UNET = tiny_unet()
MEAN, STD = 0.1, 0.2


class GaussianModel(nn.Module):
    """The exact E[eps | x_t], or E[v | x_t], when every pixel is N(MEAN, STD^2), plus `disturbance` times a UNet.

    Undisturbed it is what a perfect UNet would predict. Disturbed it stands for a trained one: DDIM with the eps of an
    untrained UNet amplifies round-off by up to 1/sqrt(abar_T), 160 here, so that nothing could be compared.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scheduler, disturbance=0.0, sample_size=8):
        super().__init__()
        self.alphas_cumprod, self.disturbance = scheduler.alphas_cumprod64, disturbance
        self.prediction_type = scheduler.config.prediction_type
        self.config = SimpleNamespace(in_channels=1, sample_size=sample_size, num_class_embeds=None)

    def forward(self, x, timesteps):
        timesteps = timesteps.expand(len(x))
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        epsilon = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
        if self.disturbance:
            epsilon = epsilon + self.disturbance * UNET(x, timesteps).sample
        if self.prediction_type == "v_prediction":
            velocity = (epsilon - (1 - alpha_bar).sqrt() * x) / alpha_bar.sqrt()
            return SimpleNamespace(sample=velocity.float())
        return SimpleNamespace(sample=epsilon.float())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads slow such small models down, and do so badly where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stock_images(pipeline_class, unet, scheduler, num_images, **kwargs):
    """What diffusers draws with generators seeded 7, 8, ..."""
    pipeline = pipeline_class(unet, scheduler.stock())
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(7 + k) for k in range(num_images)]
    images = pipeline(batch_size=num_images, generator=generators, output_type="pt", **kwargs).images
    return images * 2 - 1


def assert_same_images(ours, stock):
    assert ours.dtype == torch.float32 and ours.abs().max() <= 1
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", ["ho_linear", "nichol_cosine"])
def test_ddpm_on_all_steps_is_the_stock_pipeline(name, variance_type, prediction_type):
    scheduler = make_scheduler(name, 50, variance_type=variance_type, prediction_type=prediction_type)
    ours = draw(UNET, scheduler, image_generators(7, range(2)))
    assert_same_images(ours, stock_images(DDPMPipeline, UNET, scheduler, 2, num_inference_steps=50))


def test_ddpm_on_a_thousand_steps_is_the_stock_pipeline():
    # With the float64 table an image ended 1e-4 away: near t = 0 stock's 1 - abar_t/abar_t' is off by a thousandth.
    scheduler = make_scheduler("nichol_cosine", 1000, variance_type="fixed_large", prediction_type="v_prediction")
    unet = GaussianModel(scheduler)
    ours = draw(unet, scheduler, image_generators(7, range(2)))
    assert_same_images(ours, stock_images(DDPMPipeline, unet, scheduler, 2, num_inference_steps=1000))


@pytest.mark.parametrize(
    "spacing, variance_type",
    [("leading", "fixed_small"), ("leading", "fixed_large"), ("trailing", "fixed_small"), ("linspace", "fixed_large")],
)
def test_ddpm_on_fewer_steps_is_the_stock_pipeline(spacing, variance_type):
    scheduler = make_scheduler("ho_linear", 1000, variance_type=variance_type, timestep_spacing=spacing)
    kwargs = {"num_inference_steps": 30, "spacing": spacing, "variance_type": variance_type}
    ours = draw(UNET, scheduler, image_generators(7, range(2)), **kwargs)
    assert_same_images(ours, stock_images(DDPMPipeline, UNET, scheduler, 2, num_inference_steps=30))


@pytest.mark.parametrize("num_inference_steps", [50, 10])
def test_learned_range_is_the_stock_pipeline(num_inference_steps):
    unet, scheduler = tiny_unet(3, 6), make_scheduler("nichol_cosine", 50, variance_type="learned_range")
    ours = draw(unet, scheduler, image_generators(7, range(2)), num_inference_steps=num_inference_steps)
    stock = stock_images(DDPMPipeline, unet, scheduler, 2, num_inference_steps=num_inference_steps)
    assert_same_images(ours, stock)


def test_ddim_and_fixed_variances_leave_a_learned_variance_unused():
    unet, scheduler = tiny_unet(1, 2), make_scheduler("nichol_cosine", 10, variance_type="learned_range")
    for kwargs in ({"sampler": "ddim"}, {"variance_type": "fixed_small"}):
        images = draw(unet, scheduler, image_generators(7, range(2)), **kwargs)
        assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


@pytest.mark.parametrize("num_inference_steps, eta", [(50, 0.0), (12, 0.0), (12, 0.5)])
@pytest.mark.parametrize(
    "name, T, prediction_type",
    [
        ("ho_linear", 1000, "epsilon"),
        ("ho_linear", 1000, "sample"),
        ("ho_linear", 1000, "v_prediction"),
        ("nichol_cosine", 1000, "epsilon"),
        ("nichol_cosine", 50, "sample"),
        ("nichol_cosine", 50, "v_prediction"),
    ],
)
def test_ddim_is_the_stock_pipeline(name, T, num_inference_steps, eta, prediction_type):
    scheduler = make_scheduler(name, T, prediction_type=prediction_type)
    unet = GaussianModel(scheduler, disturbance=0.3) if prediction_type == "epsilon" else UNET
    kwargs = {"num_inference_steps": num_inference_steps, "eta": eta}
    ours = draw(unet, scheduler, image_generators(7, range(2)), sampler="ddim", **kwargs)
    assert_same_images(ours, stock_images(DDIMPipeline, unet, scheduler, 2, **kwargs))


@pytest.mark.parametrize(
    "config", [{"clip_sample": False}, {"clip_sample_range": 0.2}, {"thresholding": True, "sample_max_value": 2.0}]
)
def test_clipping_follows_the_config_as_in_the_stock_pipeline(config):
    scheduler = make_scheduler("nichol_cosine", 50, **config)
    unet = GaussianModel(scheduler, disturbance=0.3)
    ours = draw(unet, scheduler, image_generators(7, range(2)))
    assert_same_images(ours, stock_images(DDPMPipeline, unet, scheduler, 2, num_inference_steps=50))
    if scheduler.config.clip_sample:
        unclipped = draw(unet, scheduler, image_generators(7, range(2)), clip=False)
        assert (ours - unclipped).abs().max() > 0.01


def test_a_stock_user_redraws_image_k_alone():
    scheduler = make_scheduler("ho_linear", 50)
    pipeline = DDPMPipeline(UNET, scheduler.stock())
    pipeline.set_progress_bar_config(disable=True)
    ours = draw(UNET, scheduler, image_generators(7, [5, 1000]))
    stock = pipeline(
        generator=torch.Generator().manual_seed(7 + 1000), num_inference_steps=50, output_type="pt"
    ).images
    assert_same_images(ours[1:], stock * 2 - 1)


def in_batches(unet, scheduler, seed, indices, batch_size, settings=(), **kwargs):
    """Call `sample_images` with the settings that `draw` has by default."""
    settings = {"sampler": "ddpm", "timesteps": "leading", "seed": seed} | dict(settings)
    model, sampler = model_of(unet, scheduler), Sampler(name=settings.pop("sampler"), **settings)
    return sample_images(model, sampler.resolve(model), indices, batch_size=batch_size, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"sampler": "ddim", "eta": 1.0, "num_inference_steps": 5}])
def test_image_k_is_image_k_whatever_the_batch(kwargs):
    scheduler, global_state = make_scheduler("nichol_cosine", 20), torch.get_rng_state()
    together = draw(UNET, scheduler, image_generators(3, range(5)), **kwargs)
    alone = torch.cat([draw(UNET, scheduler, image_generators(3, [k]), **kwargs) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
    for indices, batch_size in ((range(5), 1), (range(5), 2), (range(5), 5), ([4, 2, 0], 2)):
        images = in_batches(UNET, scheduler, 3, indices, batch_size, progress=False, settings=kwargs)
        assert images.dtype == torch.uint8 and images.shape == (len(indices), 1, 8, 8)
        assert (images.int() - to_uint8(together[list(indices)]).int()).abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), global_state)


def gaussian_chain(scheduler, sampler, num_inference_steps, spacing, eta=0.0, variance_type=None):
    """Mean and standard deviation of what the sampler draws from the perfect model, by hand.

    With x_t ~ N(m, s^2) and x_0 predicted as E[x_0 | x_t], which is linear in x_t, every step keeps a Gaussian:
    DDIM is eq. (12) of Song et al. 2021, DDPM the same with sigma^2 = beta~ in it but the noise of `variance_type`.
    """
    m, s = 0.0, 1.0
    for t, prev_t in scheduler.subsequence(num_inference_steps, spacing):
        if t == prev_t:
            continue
        a = scheduler.alphas_cumprod64[t].item()
        b = scheduler.alphas_cumprod64[prev_t].item() if prev_t >= 0 else 1.0
        beta, beta_tilde = 1 - a / b, (1 - b) / (1 - a) * (1 - a / b)
        sigma_squared = beta_tilde * (1.0 if sampler == "ddpm" else eta**2)
        gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)  # E[x_0 | x_t] = MEAN + gain (x_t - sqrt(a) MEAN)
        direction = np.sqrt((1 - b - sigma_squared) / (1 - a))  # x_t' = sqrt(b) x_0 + direction (x_t - sqrt(a) x_0)
        slope = (np.sqrt(b) - direction * np.sqrt(a)) * gain + direction
        m = (np.sqrt(b) - direction * np.sqrt(a)) * (MEAN - gain * np.sqrt(a) * MEAN) + slope * m
        noise = beta if variance_type == "fixed_large" else sigma_squared
        s = np.sqrt(slope**2 * s**2 + (noise if prev_t >= 0 else 0.0))
    return m, s


@pytest.mark.parametrize("name", ["ho_linear", "nichol_cosine"])
@pytest.mark.parametrize("spacing", ["quad", "uniform", "leading", "trailing", "linspace", (3, 50, 200, 500, 900)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"sampler": "ddpm", "variance_type": "fixed_small"},
        {"sampler": "ddpm", "variance_type": "fixed_large"},
        {"sampler": "ddim", "eta": 0.0},
        {"sampler": "ddim", "eta": 0.7},
    ],
    ids=["fixed_small", "fixed_large", "ddim", "eta"],
)
def test_every_chain_has_the_distribution_worked_out_by_hand(name, spacing, kwargs):
    scheduler = make_scheduler(name)
    S = 30 if isinstance(spacing, str) else None  # which does not divide 1000
    mean, std = gaussian_chain(scheduler, num_inference_steps=S, spacing=spacing, **kwargs)
    unet = GaussianModel(scheduler, sample_size=64)
    generators = image_generators(0, range(8))
    images = draw(unet, scheduler, generators, num_inference_steps=S, spacing=spacing, clip=False, **kwargs)
    assert images.mean().item() == pytest.approx(mean, abs=0.006)
    assert images.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("name", ["ho_linear", "nichol_cosine"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small"},
        {"num_inference_steps": 300, "spacing": "trailing"},
        {"num_inference_steps": 300, "spacing": "linspace", "sampler": "ddim"},
        {"num_inference_steps": 300, "spacing": "trailing", "sampler": "ddim"},
        {"num_inference_steps": 300, "spacing": "quad", "sampler": "ddim"},
    ],
    ids=str,
)
def test_a_perfect_model_gives_back_the_data(name, kwargs):
    scheduler = make_scheduler(name)
    images = draw(GaussianModel(scheduler, sample_size=32), scheduler, image_generators(0, range(16)), **kwargs)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(STD, rel=0.06)  # 300 steps are off by up to 5 %, by the sums above


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_with_eta_1_is_ddpm_where_nothing_is_clipped(spacing):
    scheduler = make_scheduler("ho_linear", 100)
    unet = GaussianModel(scheduler, disturbance=0.3)
    kwargs = {"num_inference_steps": 30, "spacing": spacing, "clip": False}
    ddim = draw(unet, scheduler, image_generators(0, range(2)), sampler="ddim", eta=1.0, **kwargs)
    ddpm = draw(unet, scheduler, image_generators(0, range(2)), variance_type="fixed_small", **kwargs)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-5)


def test_the_variance_when_none_is_named():
    scheduler = make_scheduler("nichol_cosine", 20, variance_type="fixed_large")

    def image_0(**kwargs):
        return draw(UNET, scheduler, image_generators(0, range(1)), **kwargs)

    assert torch.equal(image_0(), image_0(variance_type="fixed_large"))
    assert torch.equal(image_0(num_inference_steps=10), image_0(num_inference_steps=10, variance_type="fixed_small"))
    assert not torch.equal(image_0(variance_type="fixed_small"), image_0(variance_type="fixed_large"))


def test_repeated_timesteps_cost_no_step():
    scheduler, seen = make_scheduler("linear", 100), []
    kwargs = {"num_inference_steps": 20, "spacing": "quad", "sampler": "ddim"}
    pairs = scheduler.subsequence(20, "quad")
    assert (0, 0) in pairs
    images = draw(UNET, scheduler, image_generators(0, [0]), on_step=lambda *step: seen.append(step), **kwargs)
    num_steps = len({t for t, _ in pairs})
    assert [(i, n) for i, n, _, _ in seen] == [(i, num_steps) for i in range(num_steps)]
    assert all(x.shape == x_0.shape == (1, 1, 8, 8) and x_0.abs().max() <= 1 for _, _, x, x_0 in seen)
    assert torch.equal(seen[-1][2], images) and torch.equal(seen[-1][3], images)


def test_dropout_is_off_and_the_mode_comes_back():
    unet, scheduler = tiny_unet(dropout=0.5), make_scheduler("nichol_cosine", 10)
    expected = draw(unet, scheduler, image_generators(0, range(2)))
    assert not unet.training
    unet.train()
    assert torch.equal(draw(unet, scheduler, image_generators(0, range(2))), expected)
    assert unet.training and all(module.training for module in unet.modules())

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(unet, scheduler, image_generators(0, range(2)), on_step=stop)
    assert unet.training


def test_class_labels_reach_the_unet():
    unet, scheduler = tiny_unet(num_class_embeds=3), make_scheduler("nichol_cosine", 5)
    images = draw(unet, scheduler, image_generators(0, range(3)), class_labels=[0, 2, 0])
    zeros = draw(unet, scheduler, image_generators(0, range(3)), class_labels=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(images[[0, 2]], zeros[[0, 2]], rtol=0, atol=1e-5)
    assert (images[1] - zeros[1]).abs().max() > 1e-3
    batched = in_batches(unet, scheduler, 0, range(3), 2, progress=False, settings={"class_labels": [0, 2, 0]})
    assert (batched.int() - to_uint8(images).int()).abs().max() <= 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_half_precision_of_the_unet_leaves_the_chain_in_float32(prediction_type):
    scheduler, unet = make_scheduler("nichol_cosine", 10, prediction_type=prediction_type), tiny_unet()
    dtypes = set()

    def two_images():
        def note_dtypes(i, num_steps, x, x_0):
            dtypes.update((x.dtype, x_0.dtype))

        return draw(unet, scheduler, image_generators(0, range(2)), on_step=note_dtypes)

    expected = two_images()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = two_images()
    unet.to(torch.bfloat16)
    for images in (autocast, two_images()):
        assert images.dtype == torch.float32
        assert 0 < (images - expected).abs().mean() < 0.02
    assert dtypes == {torch.float32}


def test_images_end_in_range_even_unclipped():
    images = draw(UNET, make_scheduler("nichol_cosine", 10), image_generators(0, range(2)), clip=False)
    assert images.abs().max() == 1


def test_sample_images_shows_progress_and_accepts_no_images(capsys):
    scheduler, seen = make_scheduler("nichol_cosine", 4), []
    in_batches(UNET, scheduler, 0, range(5), 2, on_step=lambda i, *rest: seen.append(i))
    progress = capsys.readouterr().err
    assert "Sampling 5 images" in progress and "5/5" in progress
    assert seen == [0, 1, 2, 3] * 3
    assert in_batches(UNET, scheduler, 0, [], 2, progress=False).shape == (0, 1, 8, 8)


def test_to_uint8_rounds_and_clamps():
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0039, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_to_pil_has_the_stock_pipelines_modes_and_pixels():
    scheduler = make_scheduler("nichol_cosine", 5)
    for unet, mode in ((UNET, "L"), (tiny_unet(3, 3), "RGB")):
        images = draw(unet, scheduler, image_generators(7, range(2)))
        pipeline = DDPMPipeline(unet, scheduler.stock())
        pipeline.set_progress_bar_config(disable=True)
        stock = pipeline(batch_size=2, generator=image_generators(7, range(2)), num_inference_steps=5).images
        for ours, same, theirs in zip(to_pil(images), to_pil(to_uint8(images)), stock):
            assert ours.mode == theirs.mode == mode and ours.size == (8, 8) and ours == same
            assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        ({"sampler": "euler"}, "sampler is 'euler'; choose ddpm, ddim, dpmsolver++."),
        (
            {"eta": 0.5},
            "eta is 0.5, and the sampler is ddpm: eta applies only to ddim and must be from 0 to 1, so change "
            "eta or leave it out.",
        ),
        (
            {"sampler": "ddim", "eta": 1.5},
            "eta is 1.5, and the sampler is ddim: eta applies only to ddim and must be from 0 to 1, so change "
            "eta or leave it out.",
        ),
        (
            {"sampler": "ddim", "variance_type": "fixed_large"},
            "variance_type is fixed_large, but the sampler is ddim: variance_type applies only to ddpm, so leave it "
            "out.",
        ),
        (
            {"variance_type": "learned"},
            "variance_type is 'learned'; choose fixed_small, fixed_large or learned_range.",
        ),
        (
            {"variance_type": "learned_range"},
            "variance_type is learned_range, but the UNet predicts no variance: give fixed_small or fixed_large.",
        ),
        ({"num_inference_steps": 11}, "num_inference_steps is 11; it must be from 1 to the model's 10 timesteps."),
        ({"class_labels": [0, 1]}, "class_labels are [0, 1], but this UNet has no classes: leave class_labels out."),
    ],
)
def test_refusals(kwargs, sentence):
    with pytest.raises(UserError) as error:
        draw(UNET, make_scheduler("nichol_cosine", 10), image_generators(0, range(2)), **kwargs)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "class_labels, sentence",
    [
        (None, "class_labels are []; give 2 labels, one per image, each from 0 to 2."),
        ([0], "class_labels are [0]; give 2 labels, one per image, each from 0 to 2."),
        ([0, 3], "class_labels are [0, 3]; give 2 labels, one per image, each from 0 to 2."),
    ],
)
def test_class_label_refusals(class_labels, sentence):
    unet, scheduler = tiny_unet(num_class_embeds=3), make_scheduler("nichol_cosine", 10)
    with pytest.raises(UserError) as error:
        draw(unet, scheduler, image_generators(0, range(2)), class_labels=class_labels)
    assert str(error.value) == sentence


def test_a_batch_size_of_0_is_refused():
    with pytest.raises(UserError, match="^--batch_size is 0; it must be a whole number of at least 1, or auto.$"):
        in_batches(UNET, make_scheduler("nichol_cosine", 10), 0, range(2), 0)
