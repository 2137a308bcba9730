"""Classifier guidance, on data whose noise prediction and classifier are known in closed form, and as users load it.

The data: a mixture of two Gaussians N(m_k, s^2 I) of equal weight. Noised, they are N(signal m_k, v I) with
v = signal^2 s^2 + sigma^2, so p(k | x_t) is a softmax, eps is sigma times a mean of (x_t - signal m_k)/v by it, and
guided with scale 1 the model is that of the class alone: eps = sigma (x_t - signal m_k)/v, by Bayes' rule.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config

from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.sampling import samplers as sampling


CODE = str(ROOT / "pipelines/classifier_guided.py")
S = 0.5  # standard deviation of each class
NAMES = {0: "cat", 1: "dog", 2: "wild"}


class Mixture(ModelMixin, ConfigMixin):
    """Both networks of the mixture with the means `means`: the UNet, or with `classify` the classifier."""

    @register_to_config
    def __init__(self, means=(-0.5, 0.5), classify=False, prediction_type="epsilon", sample_size=2, in_channels=1):
        super().__init__()
        self.register_to_config(out_channels=in_channels, num_class_embeds=None)
        self.register_to_config(num_classes=len(means), num_train_timesteps=1000, id2label=None)
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # gives a dtype and a device
        self.alphas_cumprod = make_scheduler().alphas_cumprod.double()

    def forward(self, sample, timestep):
        signal, sigma = self.alphas_cumprod[timestep].sqrt(), (1 - self.alphas_cumprod[timestep]).sqrt()
        variance = signal**2 * S**2 + sigma**2
        x = sample.double()
        residuals = x[None] - signal * torch.tensor(self.config.means)[:, None, None, None, None]
        logits = -residuals.pow(2).sum(dim=(2, 3, 4)).T / (2 * variance)
        if self.config.classify:
            return logits.float() + self.anchor
        weights = logits.softmax(dim=1).T[:, :, None, None, None]
        epsilon = sigma * (weights * residuals).sum(dim=0) / variance
        x0 = (x - sigma * epsilon) / signal
        v = signal * epsilon - sigma * x0
        output = {"epsilon": epsilon, "sample": x0, "v_prediction": v}[self.config.prediction_type]
        return SimpleNamespace(sample=output.float())


def make_scheduler(**config):
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", **{"clip_sample": False} | config)


def tiny_unet(out_channels=1, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        shape = {"sample_size": 8, "in_channels": 1, "out_channels": out_channels, "block_out_channels": (8, 8)}
        return UNet2DModel(**blocks, **shape, layers_per_block=1, norm_num_groups=4, add_attention=False, **config)


def tiny_classifier(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = {"num_classes": 3, "block_out_channels": (8, 8), "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "layers_per_block": 1, "add_attention": False}
        config = {"in_channels": 1, "num_train_timesteps": 10, "id2label": NAMES} | config
        return NoisyClassifier(**shape, **blocks, **config).eval()


def save_stock(folder, **config):
    """A stock DDPMPipeline's folder, of an untrained UNet and 10 timesteps."""
    unet = tiny_unet(2 if config.get("variance_type") == "learned_range" else 1)
    DDPMPipeline(unet, make_scheduler(num_train_timesteps=10, **config)).save_pretrained(folder)
    return folder


def load(folder, **components):
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=CODE, trust_remote_code=True, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def tiny(stock):
    return load(stock, classifier=tiny_classifier())


@pytest.fixture(scope="module")
def mixture(stock):
    """(means, prediction_type) -> the pipeline of that mixture, its classifier that of the two classes."""

    def make(means=(-0.5, 0.5), prediction_type="epsilon", **config):
        return load(
            stock,
            unet=Mixture(means, prediction_type=prediction_type),
            scheduler=make_scheduler(prediction_type=prediction_type, **config),
            classifier=Mixture(classify=True),
        )

    return make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(*seeds):
    return [generator(seed) for seed in seeds]


def draw(pipeline, labels, **arguments):
    """Samples in [-1, 1] before the last clamp, which a callback sees."""
    seen = []
    pipeline(labels, **arguments, callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors) or {})
    return seen[-1]["sample"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("arguments", [{}, {"eta": 0.7}, {"sampler": "ddpm"}], ids=str)
def test_scale_1_turns_the_mixture_into_the_class(mixture, arguments, prediction_type):
    """Step by step the same samples as the model of one Gaussian alone draws, unguided, from the same noise."""
    guided, alone = mixture(prediction_type=prediction_type), mixture((0.5,), prediction_type)
    arguments = {"num_inference_steps": 30, "generator": generator(), **arguments}
    x = draw(guided, [1] * 8, guidance_scale=1.0, **arguments)
    expected = draw(alone, [1] * 8, guidance_scale=0.0, **arguments | {"generator": generator()})
    torch.testing.assert_close(x, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guided_samples_have_the_distribution_of_their_class(mixture, sampler):
    """Mean -0.5 and 0.5, standard deviation 0.5 for both, 4000 numbers each; unguided the mean is 0."""
    labels = torch.tensor([0, 1]).repeat_interleave(1000)
    x = draw(mixture(), labels, sampler=sampler, num_inference_steps=100, generator=generator())
    for values, mean in zip(x.reshape(2, -1), (-0.5, 0.5)):
        assert abs(values.mean() - mean) < 4 * S / 4000**0.5
        assert abs(values.std() - S) < 0.03  # 4 standard errors of 0.0056, and 0.008 of 100 steps


def test_more_scale_is_further_from_the_other_class(mixture):
    pipeline, arguments = mixture(), {"num_inference_steps": 20}
    means = [
        draw(pipeline, [1] * 500, guidance_scale=scale, generator=generator(), **arguments).mean()
        for scale in (-1, 0, 1, 2, 4)
    ]
    assert means == sorted(means) and abs(means[1]) < 0.1 and means[3] > 0.55


def test_a_schedule_is_asked_at_each_step_and_0_spares_the_classifier(mixture, monkeypatch):
    pipeline, asked, classified = mixture(), [], []
    forward = Mixture.forward
    monkeypatch.setattr(
        Mixture, "forward", lambda self, x, t: (self.config.classify and classified.append(t)) or forward(self, x, t)
    )
    scale = draw(
        pipeline, 1, guidance_scale=lambda u: asked.append(u) or 3.0 * (u < 0.5), num_inference_steps=4,
        generator=generator(),
    )  # fmt: skip
    assert asked == [1.0, 0.75, 0.5, 0.25] and classified == [249]
    assert (scale - draw(pipeline, 1, guidance_scale=0, num_inference_steps=4, generator=generator())).abs().max() > 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "fixed_large", "prediction_type": "v_prediction", "clip_sample": True},
        {"variance_type": "learned_range", "clip_sample": True, "clip_sample_range": 0.7},
        {"prediction_type": "sample", "thresholding": True},
    ],
    ids=str,
)
def test_scale_0_over_all_steps_is_stock_ddpm(tmp_path, config):
    folder = save_stock(tmp_path, **config)
    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    expected = stock(batch_size=3, generator=generator(), num_inference_steps=10, output_type="np").images
    ours = load(folder, classifier=tiny_classifier())(
        [0] * 3, 0.0, "ddpm", 10, generator=generator(), output_type="np"
    )
    np.testing.assert_allclose(ours.images, expected, atol=1e-4)


@pytest.mark.parametrize("method, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_scale_0_on_few_steps_is_our_sampler(tmp_path, method, eta):
    """fixed_large gives way to fixed_small there, and 7 does not divide 10."""
    pipeline = load(save_stock(tmp_path, variance_type="fixed_large"), classifier=tiny_classifier())
    arguments = {"num_inference_steps": 7, "eta": eta}
    expected = sampling.draw(
        pipeline.unet, PaperDDPMScheduler.from_config(pipeline.scheduler.config), generators(5, 6), sampler=method,
        spacing="trailing", **arguments,
    )  # fmt: skip
    x = draw(pipeline, [0, 0], guidance_scale=0, sampler=method, generator=generators(5, 6), **arguments)
    torch.testing.assert_close(x.clamp(-1, 1), expected, atol=1e-4, rtol=0)


def test_the_betas_are_those_of_the_config_whatever_the_scheduler_and_however_they_were_given(stock):
    by_name = DDPMScheduler(num_train_timesteps=10, beta_start=0.05, beta_end=0.5)
    a, b, c = (
        load(stock, classifier=tiny_classifier(), scheduler=scheduler)(
            [0, 1], num_inference_steps=7, generator=generator(), output_type="pt"
        ).images
        for scheduler in (by_name, DDIMScheduler.from_config(by_name.config), DDPMScheduler(10, 0.05, 0.5))
    )
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_is_the_same_alone_and_in_a_batch(tiny, sampler):
    arguments = {"guidance_scale": 5.0, "sampler": sampler, "num_inference_steps": 7, "output_type": "pt"}
    batch = tiny(["wild", 0], generator=generators(3, 4), **arguments).images
    alone = tiny([0], generator=generators(4), **arguments).images
    torch.testing.assert_close(batch[1:], alone, atol=1e-5, rtol=0)
    other_class = tiny([1], generator=generators(4), **arguments).images
    assert (alone - other_class).abs().max() > 1e-3, "guidance by the real classifier must show"


def test_numbers_names_and_tensors_are_the_same_labels(tiny):
    images = [
        tiny(labels, guidance_scale=5.0, num_inference_steps=3, generator=generators(0, 1), output_type="np").images
        for labels in ([0, 2], ["cat", "wild"], torch.tensor([0, 2]), np.array([0, 2]))
    ]
    assert all(np.array_equal(images[0], other) for other in images[1:])


def test_outputs_intermediates_and_callback(tiny):
    arguments = {"num_inference_steps": 3, "return_intermediates": True}
    pt, arrays, pil = (
        tiny(["cat", "dog"], generator=generator(), output_type=kind, **arguments) for kind in ("pt", "np", "pil")
    )
    assert pt.images.shape == (2, 1, 8, 8) and arrays.images.shape == (2, 8, 8, 1) and pil.images[1].mode == "L"
    assert [len(output.intermediates) for output in (pt, arrays, pil)] == [3, 3, 3]
    assert torch.equal(pt.intermediates[-1], pt.images), "the last x_0 is the image"
    np.testing.assert_array_equal(np.asarray(pil.images[1]), np.round(arrays.images[1, :, :, 0] * 255))

    steps = []

    def replace(pipeline, i, t, tensors):
        steps.append((pipeline is tiny, i, t, sorted(tensors)))
        return {"sample": torch.zeros_like(tensors["sample"])}

    both = ["sample", "pred_original_sample"]
    images, intermediates = tiny(
        0, num_inference_steps=2, output_type="pt", return_dict=False, callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=both,
    )  # fmt: skip
    assert steps == [(True, 0, 9, sorted(both)), (True, 1, 4, sorted(both))]
    assert intermediates is None and torch.equal(images, torch.full((1, 1, 8, 8), 0.5))


def test_no_weight_gets_a_gradient_no_global_noise_is_drawn_and_inference_mode_will_do(tiny):
    state = torch.random.get_rng_state()
    arguments = {"num_inference_steps": 3, "output_type": "np"}
    plain = tiny([0], generator=generator(), **arguments).images
    with torch.inference_mode():
        assert np.array_equal(tiny([0], generator=generator(), **arguments).images, plain)
    assert torch.equal(state, torch.random.get_rng_state())
    for model in (tiny.unet, tiny.classifier):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_networks_leave_the_samples_float32(stock):
    pipeline = load(stock, classifier=tiny_classifier(), dtype=torch.bfloat16)
    pipeline.classifier.to(torch.bfloat16)
    x = draw(pipeline, [0], num_inference_steps=3, generator=generator())
    assert pipeline.unet.dtype == torch.bfloat16 and x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": 3}, "class label 3 is not known; give 0 to 2 or a name: cat, dog, wild"),
        ({"class_labels": ["cat", "cow"]}, "class label 'cow' is not known"),
        ({"class_labels": [0.5]}, "class label 0.5"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"sampler": "euler"}, "choose ddim or ddpm"),
        ({"num_inference_steps": 11}, "num_inference_steps is 11; give a whole number from 1 to the model's 10"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"sampler": "ddpm", "eta": 0.5}, "it belongs to ddim"),
        ({"generator": generators(0, 1)}, "2 generators for 1 labels"),
        ({"output_type": "latent"}, "choose pil, np or pt"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has noise; choose of sample, pred_original_sample"),
    ],
)
def test_refused_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"class_labels": 0, "num_inference_steps": 3} | arguments)


@pytest.mark.parametrize(
    "components, message",
    [
        ({"classifier": tiny_classifier(num_train_timesteps=1000)}, "for 1000 timesteps and the model for 10"),
        ({"classifier": tiny_classifier(in_channels=3)}, "for 3 channels and the model for 1"),
        ({"unet": tiny_unet(num_class_embeds=4)}, "unconditional"),
    ],
)
def test_refused_components(stock, components, message):
    with pytest.raises(ValueError, match=message):
        load(stock, **{"classifier": tiny_classifier()} | components)


def test_refused_schedulers(stock):
    for config, message in (
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"variance_type": "learned"}, "take sampler='ddim'"),
        ({"variance_type": "learned_range"}, "out_channels twice"),
    ):
        scheduler = make_scheduler(num_train_timesteps=10, **config)
        with pytest.raises(ValueError, match=message):
            load(stock, classifier=tiny_classifier(), scheduler=scheduler)(0, sampler="ddpm", num_inference_steps=3)
