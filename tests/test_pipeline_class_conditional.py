"""Classifier-free guidance as users load it: against our sampler at scale 1, and on Gaussians where it is known.

The Gaussian model: class k is N(m_k, s^2 I), "no class" N(0, s^2 I). Then eps_k = sigma (x - a m_k) / (a^2 s^2 +
sigma^2) is linear in m_k, so guidance of scale w is exactly the model of N(w m_k, s^2 I).
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, HeunDiscreteScheduler, UNet2DModel

from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.sampling.guidance import ClassifierFree
from ddpm_hf.sampling.samplers import draw, image_generators


CODE = str(ROOT / "pipelines/class_conditional.py")
NAMES = {"0": "cat", "1": "dog", "2": "wild"}


class GaussianClasses(torch.nn.Module):
    """The exact eps of the classes `means` and of none (the last embedding, mean 0); it notes its batch sizes."""

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
            sample_size=8, in_channels=1, out_channels=out_channels, num_class_embeds=num_class_embeds,
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, add_attention=False,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
        ).eval()  # fmt: skip


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
    pipeline = type(tiny)(unet, scheduler, names)
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
        arguments["method"] = arguments.pop("sampler")
        ours = draw(
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
    ours = draw(guided, scheduler, image_generators(5, range(2)), **options)
    torch.testing.assert_close(images * 2 - 1, ours, rtol=0, atol=1e-3)


def test_another_scheduler_class_keeps_its_betas(tiny):
    """Heun's betas by default are not DDPM's; a DDIM scheduler of the same config draws the same."""
    generator = image_generators(0, [0])
    expected = tiny(0, num_inference_steps=3, generator=generator, output_type="np").images
    ddim = make(tiny, tiny.unet, ten_steps(DDIMScheduler))
    images = ddim(0, num_inference_steps=3, generator=image_generators(0, [0]), output_type="np").images
    np.testing.assert_array_equal(images, expected)
    heun = HeunDiscreteScheduler(num_train_timesteps=10)
    ours = make(tiny, tiny.unet, heun)._ddpm_scheduler(4)
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
    """Every output_type shows the same images; intermediates are one x_0 a step, the last the image itself."""

    def draw(**kwargs):
        return tiny([1, 2], num_inference_steps=3, generator=image_generators(0, range(2)), **kwargs)

    tensors, arrays, pils = (draw(output_type=kind, return_intermediates=True) for kind in ("pt", "np", "pil"))
    assert tensors.images.shape == (2, 1, 8, 8) and tensors.images.dtype == torch.float32
    np.testing.assert_array_equal(arrays.images, tensors.images.permute(0, 2, 3, 1))
    for picture, array in zip(pils.images, arrays.images):
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), (array[..., 0] * 255).round())
    assert [len(output.intermediates) for output in (tensors, arrays, pils)] == [3, 3, 3]
    torch.testing.assert_close(tensors.intermediates[-1], tensors.images)
    assert not torch.equal(tensors.intermediates[0], tensors.images)
    assert draw().intermediates is None and len(draw(return_dict=False)) == 1


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


def test_class_sheet(tiny):
    """One row a class, column k from seed + k, names on the left or not."""
    arguments = dict(num_per_class=2, seed=4, guidance_scale=1.5, num_inference_steps=2)
    bare = tiny.class_sheet(names=False, **arguments)
    assert bare.mode == "L" and bare.size == (2 + 2 * 10, 2 + 3 * 10)
    image = tiny("dog", 1.5, num_inference_steps=2, generator=image_generators(5, [0])).images[0]
    cell = np.asarray(bare.crop((12, 12, 20, 20))).astype(int)
    assert abs(cell - np.asarray(image)).max() <= 1
    named = tiny.class_sheet(**arguments)
    left = np.asarray(named)[:, : named.width - bare.width]
    assert named.width > bare.width + 10 and left.min() < 100 and left[:, 0].min() == 255


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
        (dict(sampler="ddpm", eta=0.5), "belongs to 'ddim'"),
        (dict(generator=image_generators(0, range(2))), "one per label"),
        (dict(output_type="latent"), "'pil', 'np' or 'pt'"),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), "choose from 'sample'"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(**dict(class_labels=0, num_inference_steps=5) | arguments)
    for scale in (2.0, 0.0, lambda u: 1 + u):
        with pytest.raises(ValueError, match="no null class"):
            bare(0, scale, num_inference_steps=5)
    with pytest.raises(ValueError, match="classifier_guided.py"):
        make(tiny, untrained(num_class_embeds=None), tiny.scheduler, None)
    with pytest.raises(ValueError, match="give one name to each of 0..3"):
        make(tiny, tiny.unet, tiny.scheduler, {0: "cat", 2: "dog"})
    with pytest.raises(ValueError, match="at least 1"):
        tiny.class_sheet(num_per_class=0)
