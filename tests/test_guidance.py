"""Guidance without and with a classifier, against formulas written out here, for each kind of prediction."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoModel, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from test_samplers import tiny_unet

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.evaluation import reference
from ddpm_hf.evaluation.class_scores import class_accuracy
from ddpm_hf.evaluation.metric_input import Look
from ddpm_hf.models.classes import Classes
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.sampling.guidance import ClassifierFree, ClassifierGuided, guide
from ddpm_hf.sampling.sample_set import read_samples
from ddpm_hf.sampling.samplers import draw, image_generators


class Constant(torch.nn.Module):
    """A UNet whose prediction is the number of its label, or a fixed number."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, outputs, num_class_embeds=None, channels=1):
        super().__init__()
        self.outputs = torch.tensor(outputs)
        self.config = SimpleNamespace(in_channels=1, sample_size=4, num_class_embeds=num_class_embeds)
        self.config.out_channels = channels

    def forward(self, sample, timesteps, class_labels=None):
        values = self.outputs[class_labels] if class_labels is not None else self.outputs[0].expand(len(sample))
        return UNet2DOutput(values.reshape(-1, 1, 1, 1).expand(-1, self.config.out_channels, 4, 4).contiguous())


class Linear(torch.nn.Module):
    """A classifier of two classes with log-odds w * (sum of the pixels)."""

    config = SimpleNamespace(num_classes=2, in_channels=1)

    def forward(self, sample, timesteps):
        logit = 0.5 * sample.sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_goes_from_no_class_through_the_class(scale, kind):
    scheduler = make_scheduler("nichol_cosine", 100, prediction_type=kind, clip_sample=False)
    guided = ClassifierFree(Constant([2.0, 5.0, 1.0], num_class_embeds=3), scheduler, scale)
    output = guided(torch.zeros(2, 1, 4, 4), torch.full((2,), 60), torch.tensor([0, 1])).sample
    expected = torch.tensor([1 + scale * (2 - 1.0), 1 + scale * (5 - 1.0)])
    torch.testing.assert_close(output[:, 0, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_is_not_guided():
    scheduler = make_scheduler("nichol_cosine", 100, clip_sample=False)
    guided = ClassifierFree(Constant([2.0, 1.0], num_class_embeds=2, channels=2), scheduler, 3.0)
    output = guided(torch.zeros(1, 1, 4, 4), torch.full((1,), 60), torch.tensor([0])).sample
    torch.testing.assert_close(output[0, :, 0, 0], torch.tensor([4.0, 2.0]), rtol=1e-4, atol=1e-4)


def test_epsilon_goes_with_a_guided_x0_that_was_clipped():
    scheduler = make_scheduler("nichol_cosine", 100, prediction_type="sample")
    guided = ClassifierFree(Constant([0.5, 0.0], num_class_embeds=2), scheduler, 8.0)  # x_0 = 4 without clipping
    x, timesteps = torch.full((1, 1, 4, 4), 0.3), torch.tensor([60])
    output = guided(x, timesteps, torch.tensor([0])).sample
    torch.testing.assert_close(output, torch.ones(1, 1, 4, 4))
    epsilon = (0.3 - scheduler.alphas_cumprod64[60].sqrt()) / (1 - scheduler.alphas_cumprod64[60]).sqrt()
    torch.testing.assert_close(scheduler.predict_epsilon(output, x, 60)[0, 0, 0, 0], epsilon.float())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [1, 60, 99])
def test_a_classifier_moves_epsilon_by_the_gradient_times_sigma(t, kind):
    scheduler = make_scheduler("nichol_cosine", 100, prediction_type=kind, clip_sample=False)
    x, timesteps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), t)
    guided = ClassifierGuided(_with_config(Constant([0.3])), scheduler, Linear(), 2.0)
    pushed, plain = guided(x, timesteps, torch.tensor([1, 0])).sample, torch.full_like(x, 0.3)
    change = scheduler.predict_epsilon(pushed, x, t) - scheduler.predict_epsilon(plain, x, t)
    # log p(1|x) = log sigmoid(s/2) with s the sum: its gradient is (1 - p)/2 in every pixel, that of log p(0|x) -p/2.
    p = torch.sigmoid(0.5 * x.sum(dim=(1, 2, 3)))
    gradient = torch.stack([0.5 * (1 - p[0]), -0.5 * p[1]])
    sigma = (1 - scheduler.alphas_cumprod64[t]).sqrt().float()
    torch.testing.assert_close(change[:, 0, 0, 0], -2.0 * sigma * gradient, rtol=1e-3, atol=1e-4)


def test_a_guided_x0_stays_in_range_and_epsilon_goes_with_it():
    scheduler = make_scheduler("nichol_cosine", 100)
    x, timesteps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 60)
    guided = ClassifierGuided(_with_config(Constant([0.3])), scheduler, Linear(), 100.0)
    epsilon = guided(x, timesteps, torch.tensor([1, 0])).sample
    original = scheduler.predict_original_sample(epsilon, x, 60)
    assert original.abs().max() < 1 + 1e-4 and original[0].mean() > 0.9 and original[1].mean() < -0.9


def _with_config(unet):
    unet.config = FrozenDict(vars(unet.config))
    return unet


def test_scale_0_of_a_classifier_draws_what_the_model_draws():
    unet, scheduler = tiny_unet(), make_scheduler("nichol_cosine", 5)
    guided = ClassifierGuided(unet, scheduler, tiny_classifier(unet), 0.0)
    plain = draw(unet, scheduler, image_generators(0, range(2)))
    drawn = draw(guided, scheduler, image_generators(0, range(2)), class_labels=[0, 1])
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-4)
    pushed = ClassifierGuided(unet, scheduler, tiny_classifier(unet), 50.0)
    assert not torch.allclose(draw(pushed, scheduler, image_generators(0, range(2)), class_labels=[0, 1]), plain)


def tiny_classifier(unet):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoisyClassifier(
            in_channels=unet.config.in_channels,
            num_classes=2,
            id2label={0: "a", 1: "b"},
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            num_train_timesteps=5,
            beta_schedule="squaredcos_cap_v2",
        ).requires_grad_(False)


def test_a_classifier_of_other_betas_with_the_same_name_is_refused():
    """At T = 100, "linear" (1e-4 to 0.02) and ho_linear (1e-3 to 0.2) have the same name in a config of diffusers."""
    unet, trained, other = tiny_unet(), make_scheduler("ho_linear", 100), make_scheduler("linear", 100)
    shape = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), layers_per_block=1, norm_num_groups=4)
    shape |= dict(in_channels=unet.config.in_channels, num_train_timesteps=100, beta_schedule="linear")
    classifier = NoisyClassifier(**shape, quarters=trained.quarters)
    assert guide(unet, trained, Classes(), 2.0, classifier).scale == 2
    with pytest.raises(UserError, match="the classifier was trained with abar = 0.50.*, but the model has 0.93"):
        guide(unet, other, Classes(), 2.0, classifier)
    assert guide(unet, other, Classes(), 2.0, NoisyClassifier(**shape)).scale == 2  # of an earlier version


def test_what_cannot_be_guided_is_refused():
    plain, classes, scheduler = tiny_unet(), tiny_unet(num_class_embeds=3), make_scheduler("nichol_cosine", 5)
    of_two, of_three = Classes(("a", "b"), 3), Classes(("a", "b", "c"), 3)
    with pytest.raises(UserError, match="timesteps of the classifier are 5, but those of the model are 9"):
        guide(plain, make_scheduler("nichol_cosine", 9), Classes(), 2.0, tiny_classifier(plain))
    with pytest.raises(
        UserError, match="betas of the classifier are squaredcos_cap_v2, but those of the model are linear"
    ):
        guide(plain, make_scheduler("linear", 5), Classes(), 2.0, tiny_classifier(plain))
    with pytest.raises(UserError, match="--guidance_scale is nan"):
        guide(classes, scheduler, of_two, float("nan"))
    with pytest.raises(UserError, match="this model has no classes"):
        guide(plain, scheduler, Classes(), 2.0)
    with pytest.raises(UserError, match="trained with --label_dropout, and this model was not"):
        guide(classes, scheduler, of_three, 2.0)
    with pytest.raises(UserError, match="this model is conditional"):
        guide(classes, scheduler, of_two, 2.0, tiny_classifier(plain))
    assert guide(classes, scheduler, of_three, 1.0) is classes


def test_a_conditional_run_says_its_classes_and_how_to_ask_for_them(guidance_models):
    index = json.loads((guidance_models / "conditional" / "model_index.json").read_text())
    assert index["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert load_pretrained(str(guidance_models / "conditional")).classes.names == tuple("0123456789")
    assert load_pretrained(str(guidance_models / "conditional" / "checkpoint-6")).classes.names == tuple("0123456789")
    unet = UNet2DModel.from_pretrained(guidance_models / "conditional" / "unet")
    assert unet.config.num_class_embeds == 11
    assert unet.class_embedding.weight.shape == (11, 32)
    card = (guidance_models / "conditional" / "README.md").read_text()
    assert 'custom_pipeline="class_guided"' in card and "pipeline(class_labels=[0]" in card


def test_a_classifier_run_leaves_a_classifier_that_loads_without_ddpm_hf(guidance_models):
    lines = [json.loads(line) for line in (guidance_models / "classifier" / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[-1]["validation_accuracy"] <= 1 and len(lines[-1]["validation_accuracy_by_band"]) == 4
    folder = str(guidance_models / "classifier")
    classifier = AutoModel.from_pretrained(folder, subfolder="classifier", trust_remote_code=True)
    assert classifier.config.num_train_timesteps == 10 and not (guidance_models / "classifier" / "samples").exists()
    card = (guidance_models / "classifier" / "README.md").read_text()
    assert "python -m ddpm_hf sample MODEL --classifier classifier" in card


def run(*arguments):
    """Run `python -m ddpm_hf` in this process; return its exit code."""
    try:
        main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code
    return 0


def test_sample_is_guided_as_asked(guidance_models, tmp_path, capsys):
    few = ["--num_images=4", "--sampler=ddim", "--num_inference_steps=3", "--class_labels=3,7"]
    drawn = {}
    for scale in (1, 4):
        output = tmp_path / str(scale)
        wanted = [*few, f"--guidance_scale={scale}", "--output", output]
        assert run("sample", guidance_models / "conditional", *wanted) == 0
        drawn[scale] = read_samples(output)
    assert drawn[4].sampler["guidance_scale"] == 4 and "guidance_scale" not in drawn[1].sampler
    assert not torch.equal(drawn[1].images, drawn[4].images)
    # Images in the folder are never taken for those of other settings, with guidance or without.
    unguided = [*few, "--output", tmp_path / "4"]
    assert run("sample", guidance_models / "conditional", *unguided) == 2
    assert "guidance_scale: 4.0 for those samples, None for the new one" in capsys.readouterr().err
    by = ["--classifier", guidance_models / "classifier", "--guidance_scale=400"]
    assert run("sample", guidance_models / "plain", *few, *by, "--output", tmp_path / "by") == 0
    assert "4 images are in" in capsys.readouterr().out
    record = json.loads((tmp_path / "by" / "samples.json").read_text())["sampler"]
    assert len(record["classifier"]) == 64 and record["class_labels"] == [3, 7]


def test_a_checkpoint_knows_its_classes_wherever_it_lies(guidance_models, tmp_path):
    shutil.copytree(guidance_models / "conditional" / "checkpoint-6", tmp_path / "checkpoint-6")
    model = load_pretrained(str(tmp_path / "checkpoint-6"))
    assert model.classes.names == tuple("0123456789") and len(model.classes) == 10


def test_a_class_goes_by_its_name_before_its_number():
    classes = Classes(("7", "3", "cat"), 3)
    assert [classes.number(label) for label in ("7", "3", "cat", "0", 1)] == [0, 1, 2, 0, 1]
    with pytest.raises(UserError, match="has 'dog', but the classes of this model are 7, 3, cat"):
        classes.number("dog")


def test_names_of_classes_come_in_the_order_of_their_numbers():
    assert Classes.of_model(3, {"0": "a", "10": "k", "2": "c"}).names == ("a", "c", "k")
    assert Classes.of_model(3, None).names is None and not Classes.of_model(None, {"0": "a"})


@pytest.mark.parametrize("of_train", [list("0123456789"), ["cat", "dog"]])
def test_class_accuracy_is_of_the_names_that_were_asked_for(of_train):
    """Labels 0 and 1 of a model of threes and sevens mean 3 and 7; the floor is of real threes and sevens."""
    seen = torch.nn.functional.one_hot(torch.tensor([3, 7, 3, 1, 3, 9]), 10).float()  # requested: 3 7 3 7 3 7
    real = SimpleNamespace(class_names=of_train, labels=torch.tensor([1, 0, -1, 1]))
    if of_train[0] == "0":
        real.labels = torch.tensor([3, 7, -1, 5])
    evaluation = SimpleNamespace(requested_classes=["3", "7"], held_out=real)
    held_out = SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([3, 1, 9, 0]), 10).float())
    extractor = SimpleNamespace(name="digits", pipeline="28px", sha256="0", class_names=tuple("0123456789"))
    generated = SimpleNamespace(logits=seen)
    look = Look(evaluation, torch.zeros(6, 1, 28, 28), extractor, generated, None, held_out)
    one = class_accuracy(look)
    assert one["value"] == pytest.approx(4 / 6) and one["se"] == pytest.approx((2 / 9 / 6 + 1 / 144) ** 0.5 * 6 / 7)
    assert one["floor"] == (0.5 if of_train[0] == "0" else None)


def test_class_accuracy_of_more_held_out_images_than_are_kept(monkeypatch):
    """Of five held-out images, three rows are kept: 0, 2 and 4. If none is of a requested class, there is no floor."""
    monkeypatch.setattr(reference, "MAX_FEATURES", 3)
    seen = torch.nn.functional.one_hot(torch.tensor([3, 3]), 10).float()
    held_out = SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([3, 3, 1]), 10).float())
    extractor = SimpleNamespace(name="digits", pipeline="28px", sha256="0", class_names=tuple("0123456789"))
    for labels, floor in [([3, 9, 5, 9, 3], 0.5), ([5, 3, 5, 3, 5], None)]:
        real = SimpleNamespace(class_names=list("0123456789"), labels=torch.tensor(labels))
        evaluation = SimpleNamespace(requested_classes=["3"], held_out=real)
        generated = SimpleNamespace(logits=seen)
        look = Look(evaluation, torch.zeros(2, 1, 28, 28), extractor, generated, None, held_out)
        one = class_accuracy(look)
        assert one["floor"] == floor
        assert one["value"] == 1 and one["se"] == pytest.approx(1 / (2 * 3))  # of two images, all right


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["plain", "--guidance_scale=2"], "this model has no classes"),
        (["plain", "--class_labels=1"], "this model has no classes: leave --class_labels out"),
        (["conditional", "--class_labels=10"], "has '10', but the classes of this model are 0, 1, 2"),
        (["conditional", "--classifier=classifier"], "this model is conditional"),
        (["plain", "--classifier=plain"], "the classifier in plain cannot be loaded"),
        (["plain", "--classifier=classifier", "--guidance_scale=inf"], "must be a finite number"),
        (["classifier"], "classifier is the run of a classifier, not of a model: give a model"),
        (["classifier/checkpoint-6"], "is a checkpoint of a classifier"),
    ],
)
def test_sample_refuses_guidance_that_cannot_be(guidance_models, arguments, sentence, capsys, monkeypatch):
    monkeypatch.chdir(guidance_models)
    assert run("sample", *arguments, "--num_images=1", "--output=drawn") == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (guidance_models / "drawn").exists()


@pytest.mark.parametrize("labels, numbers", [(7, [7]), ("7", [7]), ("12", [12]), (["7", 12], [7, 12])])
def test_one_class_may_be_given_without_a_list(labels, numbers):
    assert Classes(None, 13).numbers(labels) == numbers
