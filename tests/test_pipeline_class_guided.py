"""pipelines/class_guided.py as users load it: without guidance against ddpm_hf's sampler, with it on Gaussians.

Classifier-free: class k is N(m_k, s^2 I), "no class" N(0, s^2 I). Then eps_k = sigma (x - a m_k) / (a^2 s^2 + sigma^2)
is linear in m_k, so guidance of scale w is exactly the model of N(w m_k, s^2 I).

With a classifier: a mixture of two Gaussians N(m_k, s^2 I) of equal weight. Noised, they are N(signal m_k, v I) with
v = signal^2 s^2 + sigma^2, so p(k | x_t) is a softmax, and eps is sigma times its mean of (x_t - signal m_k)/v. Guided
with scale 1 the model is that of the class alone, eps = sigma (x_t - signal m_k)/v, by Bayes' rule.
"""

import json
import sys
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
    HeunDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config

from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.sampling import samplers
from ddpm_hf.sampling.guidance import ClassifierFree
from ddpm_hf.sampling.samplers import image_generators


CODE = str(ROOT / "pipelines/class_guided.py")
S = 0.5  # standard deviation of each class of the mixture
NAMES = {"0": "cat", "1": "dog", "2": "wild"}


class GaussianClasses(torch.nn.Module):
    """A UNet that predicts the exact eps: class k has mean `means[k]`, and the last label, no class, has mean 0.

    `batches` lists the batch sizes of the calls.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, means, scheduler, std=0.2):
        super().__init__()
        self.means, self.std, self.alphas_cumprod = torch.tensor([*means, 0.0]), std, scheduler.alphas_cumprod.double()
        shape = dict(in_channels=1, out_channels=1, sample_size=4)
        self.config = SimpleNamespace(num_class_embeds=len(self.means), **shape)
        self.batches = []

    def forward(self, x, timesteps, class_labels):
        self.batches.append(len(x))
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        centred = x - alpha_bar.sqrt() * self.means[class_labels].reshape(-1, 1, 1, 1)
        epsilon = (1 - alpha_bar).sqrt() * centred / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return SimpleNamespace(sample=epsilon.float())


def untrained(num_class_embeds=4, out_channels=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=out_channels,
            num_class_embeds=num_class_embeds,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            add_attention=False,
            down_block_types=["DownBlock2D"] * 2,
            up_block_types=["UpBlock2D"] * 2,
        ).eval()


def ten_steps(scheduler_class=DDPMScheduler, **config):
    return scheduler_class(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2", **config)


def save(folder, unet, names=NAMES):
    """The folder of a stock DDPMPipeline with `names` in its model_index.json."""
    DDPMPipeline(unet, ten_steps()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder


def load(folder, **kwargs):
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=CODE, trust_remote_code=True, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(save(tmp_path_factory.mktemp("tiny"), untrained()))


def make(tiny, unet, scheduler, names=NAMES):
    """The class that was loaded, with other parts."""
    pipeline = type(tiny)(unet, scheduler, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gaussian(tiny, means):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    return make(tiny, GaussianClasses(means, scheduler), scheduler, {str(k): f"m{k}" for k in range(len(means))})


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "sample", "clip_sample_range": 0.5},
        {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
        {"prediction_type": "v_prediction", "variance_type": "learned_range"},
        {"prediction_type": "sample", "thresholding": True},
    ],
)
def test_at_scale_1_it_is_our_sampler(tiny, config):
    """Image k is that of ddpm_hf's sampler from the same generators, on all timesteps and on three of ten."""
    unet = untrained(out_channels=2 if config.get("variance_type") == "learned_range" else 1)
    pipeline, scheduler = make(tiny, unet, ten_steps(**config)), ten_steps(PaperDDPMScheduler, **config)
    for arguments in (
        dict(sampler="ddpm", num_inference_steps=10),
        dict(sampler="ddpm", num_inference_steps=3),
        dict(sampler="ddim", num_inference_steps=3),
        dict(sampler="ddim", num_inference_steps=10, eta=0.7),
    ):
        images = pipeline([2, "cat"], generator=image_generators(5, range(2)), output_type="pt", **arguments).images
        ours = samplers.draw(
            pipeline.unet,
            scheduler,
            image_generators(5, range(2)),
            spacing="trailing",
            class_labels=[2, 0],
            **arguments,
        )
        torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-4)
        assert images.std() > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_guided_it_is_our_sampler_under_guidance(tiny, kind):
    """Clipping acts here: x_0 of an untrained UNet at scale 5 is far out of range."""
    pipeline, scheduler = make(tiny, untrained(), ten_steps(prediction_type=kind)), ten_steps(PaperDDPMScheduler)
    scheduler.register_to_config(prediction_type=kind)
    arguments = dict(guidance_scale=5.0, sampler="ddim", num_inference_steps=5, output_type="pt")
    images = pipeline([2, "cat"], generator=image_generators(5, range(2)), **arguments).images
    guided = ClassifierFree(pipeline.unet, scheduler, 5.0)
    options = dict(sampler="ddim", num_inference_steps=5, spacing="trailing", class_labels=[2, 0])
    ours = samplers.draw(guided, scheduler, image_generators(5, range(2)), **options)
    torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-3)


def test_another_scheduler_class_keeps_its_betas(tiny):
    """Heun's betas by default are not DDPM's; a DDIM scheduler of the same config draws the same."""
    generator = image_generators(0, [0])
    expected = tiny(0, num_inference_steps=3, generator=generator, output_type="np").images
    ddim = make(tiny, tiny.unet, ten_steps(DDIMScheduler))
    images = ddim(0, num_inference_steps=3, generator=image_generators(0, [0]), output_type="np").images
    np.testing.assert_array_equal(images, expected)
    heun = HeunDiscreteScheduler(num_train_timesteps=10)
    ours = sys.modules[type(tiny).__module__].ddpm_scheduler(heun)
    torch.testing.assert_close(ours.alphas_cumprod, heun.alphas_cumprod)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_moves_the_mean(tiny, sampler):
    """Scale w on class mean m draws what the class of mean w m draws; 0 what "no class" draws."""
    arguments = dict(sampler=sampler, num_inference_steps=20, output_type="np")
    pipeline = gaussian(tiny, [0.2, -0.1, 0.5, -0.25, 0.0])

    def draw(label, scale):
        return pipeline(label, guidance_scale=scale, generator=image_generators(1, [0]), **arguments).images

    np.testing.assert_allclose(draw("m0", 2.5), draw("m2", 1.0), atol=1e-4)
    np.testing.assert_allclose(draw("m1", 2.5), draw("m3", 1.0), atol=1e-4)
    np.testing.assert_allclose(draw("m2", 0.0), draw("m4", 1.0), atol=1e-4)
    assert abs(draw("m2", 1.0) - draw("m0", 1.0)).min() > 0.05


def test_guided_ddim_follows_the_ode(tiny):
    """The ODE of N(m, s^2) takes x_T to m + s (x_T - a m) / sqrt(a^2 s^2 + sigma^2); a thousand steps are near it."""
    pipeline = gaussian(tiny, [0.1])
    images = pipeline(0, 3.0, num_inference_steps=1000, generator=image_generators(2, [0]), output_type="pt").images
    alpha_bar = pipeline.scheduler.alphas_cumprod[-1].item()
    noise = torch.randn(1, 1, 4, 4, generator=image_generators(2, [0])[0])
    exact = 0.3 + 0.2 * (noise - alpha_bar**0.5 * 0.3) / (alpha_bar * 0.2**2 + 1 - alpha_bar) ** 0.5
    assert (images * 2 - 1 - exact).abs().max() < 5e-3


def test_schedule_of_guidance(tiny):
    """An interval guides, with a doubled batch, only inside it; a constant function is the constant."""
    pipeline = gaussian(tiny, [0.2, 0.6])
    times = []

    def interval(u):
        times.append(u)
        return 3.0 if 0.2 < u < 0.7 else 1.0

    arguments = dict(num_inference_steps=10, output_type="np")
    partly = pipeline([0, 0], interval, generator=image_generators(0, range(2)), **arguments).images
    assert times == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert pipeline.unet.batches == [2] * 4 + [4] * 4 + [2] * 2
    fully = pipeline([0, 0], lambda u: 3.0, generator=image_generators(0, range(2)), **arguments).images
    np.testing.assert_array_equal(
        fully, pipeline([0, 0], 3.0, generator=image_generators(0, range(2)), **arguments).images
    )
    plain = pipeline([0, 0], generator=image_generators(0, range(2)), **arguments).images
    assert (plain < partly).all() and (partly < fully).all()


def test_learned_variance_is_the_conditional_one(tiny):
    """Guided, the first half of the output is mixed and the second, the variance, is that of the label."""
    pipeline = make(tiny, untrained(out_channels=2), ten_steps(variance_type="learned_range"))
    x, label = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    conditional = pipeline.unet(x, 5, class_labels=label).sample
    null = pipeline.unet(x, 5, class_labels=torch.tensor([3])).sample
    guided = pipeline._guided_output(x, 5, label, 3.0)
    torch.testing.assert_close(guided[:, :1], (3 * conditional - 2 * null)[:, :1])
    torch.testing.assert_close(guided[:, 1:], conditional[:, 1:])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_image_k_is_image_k(tiny, sampler):
    """Alone or in a batch, whatever the labels beside it; the global generator is not used."""
    arguments = dict(guidance_scale=2.0, sampler=sampler, num_inference_steps=4, output_type="np")
    before = torch.get_rng_state()
    images = tiny(["dog", 0, 2], generator=image_generators(3, range(3)), **arguments).images
    alone = tiny(2, generator=image_generators(3, [2]), **arguments).images
    np.testing.assert_allclose(images[2:], alone, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


def test_outputs(tiny):
    """Every output_type shows the same images; `steps` yields one x_0 a step, the last the image itself."""

    def draw(**kwargs):
        return tiny([1, 2], num_inference_steps=3, generator=image_generators(0, range(2)), **kwargs)

    tensors, arrays, pils = (draw(output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensors.images.shape == (2, 1, 8, 8) and tensors.images.dtype == torch.float32
    np.testing.assert_array_equal(arrays.images, tensors.images.permute(0, 2, 3, 1))
    for picture, array in zip(pils.images, arrays.images):
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), (array[..., 0] * 255).round())
    steps = tiny.steps([1, 2], num_inference_steps=3, generator=image_generators(0, range(2)))
    predicted = [(tensors["pred_original_sample"] / 2 + 0.5).clamp(0, 1) for _, _, tensors in steps]
    assert len(predicted) == 3
    torch.testing.assert_close(predicted[-1], tensors.images)
    assert not torch.equal(predicted[0], tensors.images)
    assert len(draw(return_dict=False)) == 1


def test_callback(tiny):
    """It sees each step, and the sample it returns goes on: zeros after the last step are a grey image."""
    seen = []

    def see(pipeline, i, t, tensors):
        assert pipeline is tiny
        seen.append((i, t, sorted(tensors)))
        return {"sample": torch.zeros(1, 1, 8, 8)} if i == 2 else {}

    both = ["sample", "pred_original_sample"]
    callback = dict(callback_on_step_end=see, callback_on_step_end_tensor_inputs=both)
    images = tiny(0, num_inference_steps=3, output_type="pt", generator=image_generators(0, [0]), **callback).images
    assert seen == [(0, 9, sorted(both)), (1, 6, sorted(both)), (2, 2, sorted(both))]
    assert (images == 0.5).all()


def test_labels_by_name_and_number(tiny, tmp_path):
    """The names go with the folder, through a save, and a stock pipeline still loads it."""
    assert tiny.class_ids("wild") == [2] and tiny.class_ids(torch.tensor([1, 0])) == [1, 0]
    assert tiny.class_ids(["dog", 2]) == [1, 2] and tiny.null_class == 3
    tiny.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.labels == ["cat", "dog", "wild"] and dict(again.config.id2label) == NAMES
    unnamed = make(tiny, tiny.unet, tiny.scheduler, None)
    assert unnamed.labels == ["0", "1", "2", "3"] and unnamed.null_class is None


def test_no_class_and_no_classes(tiny, stock):
    """class_labels=None is the null class; an unconditional model without a classifier draws as our sampler does."""
    arguments = dict(num_inference_steps=3, output_type="pt", num_images=2)
    images = tiny(generator=image_generators(0, range(2)), **arguments).images
    labels = dict(spacing="trailing", num_inference_steps=3, sampler="ddim", class_labels=[3, 3])
    ours = samplers.draw(tiny.unet, ten_steps(PaperDDPMScheduler), image_generators(0, range(2)), **labels)
    torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-4)

    plain = load(stock)
    assert plain.classifier is None and plain.labels == [] and plain.null_class is None
    images = plain(generator=image_generators(0, range(2)), **arguments).images
    scheduler = PaperDDPMScheduler.from_config(plain.scheduler.config)
    ours = samplers.draw(plain.unet, scheduler, image_generators(0, range(2)), **labels | {"class_labels": None})
    torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-4)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    signal, sigma = (scheduler.alphas_cumprod[4] ** 0.5, (1 - scheduler.alphas_cumprod[4]) ** 0.5)
    torch.testing.assert_close(plain.predict(x, 4), (x - sigma * plain.unet(x, 4).sample) / signal)
    for arguments, words in (
        (dict(class_labels=0), "this model has no classes; give num_images"),
        (dict(guidance_scale=2.0), "no null class and there is no classifier"),
        (dict(num_images=0), "num_images is 0; give a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            plain(num_inference_steps=3, **arguments)
    with pytest.raises(ValueError, match="num_images is 2, but class_labels"):
        tiny(0, num_images=2)


def test_the_watcher_of_steps_may_replace_the_sample(tiny):
    """`steps` goes on from the sample that it finds, and stops where it is left."""
    for i, _, tensors in tiny.steps(0, num_inference_steps=2, generator=image_generators(0, [0])):
        if i == 0:
            tensors["sample"] = torch.zeros(1, 1, 8, 8)
    replaced = dict(callback_on_step_end=lambda pipeline, i, t, seen: {"sample": 0 * seen["sample"]} if i == 0 else {})
    again = tiny(0, num_inference_steps=2, generator=image_generators(0, [0]), output_type="pt", **replaced).images
    assert torch.equal((tensors["sample"] / 2 + 0.5).clamp(0, 1), again)


def test_refusals(tiny):
    """Each is one sentence that says what to do, before anything is drawn."""
    bare = make(tiny, tiny.unet, tiny.scheduler, {k: f"m{k}" for k in range(4)})
    for arguments, words in (
        (dict(class_labels="horse"), "give one or more of 0 .cat., 1 .dog., 2 .wild."),
        (dict(class_labels=[0, 3]), "by number or by name"),
        (dict(class_labels=[]), "give one or more"),
        (dict(guidance_scale=float("nan")), "give a finite number"),
        (dict(guidance_scale="3"), "give a finite number"),
        (dict(sampler="euler"), "choose 'ddim' or 'ddpm'"),
        (dict(num_inference_steps=11), "from 1 to 10"),
        (dict(sampler="ddpm", eta=0.5), "0 for 'ddpm'"),
        (dict(generator=image_generators(0, range(2))), "one per image"),
        (dict(output_type="latent"), "'pil', 'np' or 'pt'"),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), "choose from 'sample'"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(**dict(class_labels=0, num_inference_steps=5) | arguments)
    for scale in (2.0, 0.0, lambda u: 1 + u):
        with pytest.raises(ValueError, match="no null class"):
            bare(0, scale, num_inference_steps=5)
    with pytest.raises(ValueError, match="cannot draw without a class"):
        bare(num_inference_steps=5)
    with pytest.raises(ValueError, match="give one name to each of 0..3"):
        make(tiny, tiny.unet, tiny.scheduler, {0: "cat", 2: "dog"})


# From here on with a classifier.


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


def tiny_classifier(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = {"num_classes": 3, "block_out_channels": (8, 8), "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "layers_per_block": 1, "add_attention": False}
        config = {"in_channels": 1, "num_train_timesteps": 10, "id2label": NAMES} | config
        return NoisyClassifier(**shape, **blocks, **config).eval()


def save_stock(folder, **config):
    """A stock DDPMPipeline's folder, of an untrained UNet and 10 timesteps."""
    unet = untrained(None, 2 if config.get("variance_type") == "learned_range" else 1)
    DDPMPipeline(unet, make_scheduler(num_train_timesteps=10, **config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def steered(stock):
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
        pipeline,
        1,
        guidance_scale=lambda u: asked.append(u) or 3.0 * (u < 0.5),
        num_inference_steps=4,
        generator=generator(),
    )
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
    expected = samplers.draw(
        pipeline.unet,
        PaperDDPMScheduler.from_config(pipeline.scheduler.config),
        generators(5, 6),
        sampler=method,
        spacing="trailing",
        **arguments,
    )
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
def test_an_image_is_the_same_alone_and_in_a_batch(steered, sampler):
    arguments = {"guidance_scale": 5.0, "sampler": sampler, "num_inference_steps": 7, "output_type": "pt"}
    batch = steered(["wild", 0], generator=generators(3, 4), **arguments).images
    alone = steered([0], generator=generators(4), **arguments).images
    torch.testing.assert_close(batch[1:], alone, atol=1e-5, rtol=0)
    other_class = steered([1], generator=generators(4), **arguments).images
    assert (alone - other_class).abs().max() > 1e-3, "guidance by the real classifier must show"


def test_numbers_names_and_tensors_are_the_same_labels(steered):
    images = [
        steered(labels, guidance_scale=5.0, num_inference_steps=3, generator=generators(0, 1), output_type="np").images
        for labels in ([0, 2], ["cat", "wild"], torch.tensor([0, 2]), np.array([0, 2]))
    ]
    assert all(np.array_equal(images[0], other) for other in images[1:])


def test_outputs_and_callback_of_a_classifier(steered):
    arguments = {"num_inference_steps": 3}
    pt, arrays, pil = (
        steered(["cat", "dog"], generator=generator(), output_type=kind, **arguments) for kind in ("pt", "np", "pil")
    )
    assert pt.images.shape == (2, 1, 8, 8) and arrays.images.shape == (2, 8, 8, 1) and pil.images[1].mode == "L"
    predicted = [
        (tensors["pred_original_sample"] / 2 + 0.5).clamp(0, 1)
        for _, _, tensors in steered.steps(["cat", "dog"], generator=generator(), **arguments)
    ]
    assert len(predicted) == 3 and torch.equal(predicted[-1], pt.images), "the last x_0 is the image"
    np.testing.assert_array_equal(np.asarray(pil.images[1]), np.round(arrays.images[1, :, :, 0] * 255))

    steps = []

    def replace(pipeline, i, t, tensors):
        steps.append((pipeline is steered, i, t, sorted(tensors)))
        return {"sample": torch.zeros_like(tensors["sample"])}

    both = ["sample", "pred_original_sample"]
    (images,) = steered(
        0,
        num_inference_steps=2,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=both,
    )
    assert steps == [(True, 0, 9, sorted(both)), (True, 1, 4, sorted(both))]
    assert torch.equal(images, torch.full((1, 1, 8, 8), 0.5))


def test_no_weight_gets_a_gradient_no_global_noise_is_drawn_and_inference_mode_will_do(steered):
    state = torch.random.get_rng_state()
    arguments = {"num_inference_steps": 3, "output_type": "np"}
    plain = steered([0], generator=generator(), **arguments).images
    with torch.inference_mode():
        assert np.array_equal(steered([0], generator=generator(), **arguments).images, plain)
    assert torch.equal(state, torch.random.get_rng_state())
    for model in (steered.unet, steered.classifier):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_networks_leave_the_samples_float32(stock):
    pipeline = load(stock, classifier=tiny_classifier(), dtype=torch.bfloat16)
    pipeline.classifier.to(torch.bfloat16)
    x = draw(pipeline, [0], num_inference_steps=3, generator=generator())
    assert pipeline.unet.dtype == torch.bfloat16 and x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"class_labels": 3},
            "class label 3 is not known; give one or more of 0 .cat., 1 .dog., 2 .wild., by number or by name",
        ),
        ({"class_labels": ["cat", "cow"]}, "class label 'cow' is not known"),
        ({"class_labels": [0.5]}, "class label 0.5"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"sampler": "euler"}, "choose 'ddim' or 'ddpm'"),
        ({"num_inference_steps": 11}, "num_inference_steps is 11; give a whole number from 1 to 10"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"sampler": "ddpm", "eta": 0.5}, "0 for 'ddpm'"),
        ({"generator": generators(0, 1)}, "generator is a list of 2 for 1 images"),
        ({"output_type": "latent"}, "choose 'pil', 'np' or 'pt'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise.*choose from 'sample' and 'pred_original_sample'"),
    ],
)
def test_refused_arguments(steered, arguments, message):
    with pytest.raises(ValueError, match=message):
        steered(**{"class_labels": 0, "num_inference_steps": 3} | arguments)


@pytest.mark.parametrize(
    "components, message",
    [
        ({"classifier": tiny_classifier(num_train_timesteps=1000)}, "for 1000 timesteps and the model for 10"),
        ({"classifier": tiny_classifier(in_channels=3)}, "for 3 channels and the model for 1"),
        ({"unet": untrained(4)}, "unconditional"),
    ],
)
def test_refused_components(stock, components, message):
    with pytest.raises(ValueError, match=message):
        load(stock, **{"classifier": tiny_classifier()} | components)


def test_refused_schedulers(stock):
    for config, message in (
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"variance_type": "learned"}, "take sampler='ddim'"),
        ({"variance_type": "learned_range"}, "does not predict the variance"),
    ):
        scheduler = make_scheduler(num_train_timesteps=10, **config)
        with pytest.raises(ValueError, match=message):
            load(stock, classifier=tiny_classifier(), scheduler=scheduler)(0, sampler="ddpm", num_inference_steps=3)
