"""The noisy classifier: its shapes, inputs and training, and a saved folder that loads with diffusers alone."""

import json
import shutil

import pytest
import torch
from conftest import steps
from diffusers import AutoModel

from ddpm_hf.diffusion.losses import NUM_BANDS, accuracy
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.training.periodic import averages
from ddpm_hf.training.validation import validate, validation_loss


TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "norm_num_groups": 4,
}
NAMES = {0: "cat", 1: "dog", 2: "wild"}


def classifier(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoisyClassifier(**TINY | config).eval()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_images_without_a_class_count_in_no_loss_and_in_no_accuracy(tmp_path, image_folder):
    data = tmp_path / "data"
    for k, path in enumerate(sorted(image_folder.rglob("*.png"))):  # every third one is outside of a class's folder
        target = data / (path.name if k % 3 == 0 else f"{path.parent.name}/{path.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    flags = [f"--train_data_dir={data}", "--dataset_name=", "--objective=classify", "--validation_split=6"]
    flags += ["--train_batch_size=1", "--use_ema", f"--output_dir={tmp_path / 'run'}", "--lr_scheduler=constant"]
    run, _ = steps(6, *flags)
    kept = int((run.train_set.labels >= 0).sum())
    assert 0 < kept < 6
    counts = [row.view(-1)[NUM_BANDS : 2 * NUM_BANDS].sum() for row in run.state.pending]
    assert sorted(counts) == [0.0] * (6 - kept) + [1.0] * kept
    assert averages(run.state.pending)["loss"] == pytest.approx(
        float(sum(row[:NUM_BANDS].sum() for row in run.state.pending)) / kept
    )
    without = [row for row, count in zip(run.state.pending, counts) if not count]
    assert averages(without)["loss"] is None

    labels = run.validation_set.labels
    labels[:2] = -1
    for measure in (run.loss, accuracy(run.scheduler)):
        assert validation_loss(run, run.network, measure)[1].sum() == (labels >= 0).sum() > 0
    labels.fill_(-1)
    assert validate(run)["validation_accuracy"] is validate(run)["validation_loss"] is None


@torch.no_grad()
def test_one_timestep_is_that_of_every_image_and_a_batch_is_its_images():
    model, x = classifier(), images(3, 1, 8, 8)
    logits = model(x, torch.tensor([0, 7, 400]))
    assert logits.shape == (3, 3)
    alone = [model(x[k : k + 1], t) for k, t in enumerate((0, torch.tensor(7), torch.tensor([400])))]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-6, rtol=0)
    assert (model(x, 0) - model(x, 400)).abs().max() > 1e-3, "it must know the noise level"


@pytest.mark.parametrize("height, width", [(8, 8), (7, 13), (32, 4)])
def test_any_size(height, width):
    assert classifier()(images(2, 1, height, width), 3).shape == (2, 3)


@torch.no_grad()
def test_the_mean_over_pixels_makes_the_head_blind_to_where_a_feature_lies():
    """Without convolution strides and borders nothing but the pooling is left: one block, a shifted periodic image."""
    model = classifier(block_out_channels=(8,), down_block_types=("DownBlock2D",))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    x = images(1, 1, 8, 8)
    torch.testing.assert_close(model(x, 5), model(x.roll((3, 2), (2, 3)), 5), atol=1e-5, rtol=0)
    assert (model(x, 5) - model(images(1, 1, 8, 8, seed=1), 5)).abs().max() > 1e-3


def test_it_learns_and_every_weight_takes_part():
    """Three kinds of image, at random noise levels; chance is a loss of log 3 = 1.10."""
    model = classifier().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        labels = torch.randint(3, (32,), generator=generator)
        timesteps = torch.randint(1000, (32,), generator=generator)
        sigma = (timesteps / 2000)[:, None, None, None]
        noise = torch.randn(32, 1, 8, 8, generator=generator)
        x = (1 - sigma**2).sqrt() * (labels - 1.0)[:, None, None, None] + sigma * noise
        loss = torch.nn.functional.cross_entropy(model(x, timesteps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_a_saved_folder_loads_by_AutoModel_from_the_code_in_it(tmp_path):
    model, x = classifier(id2label=NAMES), images(2, 1, 8, 8)
    folder, again = str(tmp_path / "model"), str(tmp_path / "again")  # AutoModel takes no Path
    model.save_pretrained(folder)
    auto_map = json.loads((tmp_path / "model/config.json").read_text())["auto_map"]
    assert auto_map == {"AutoModel": "classifier.NoisyClassifier"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(folder)

    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__ == "diffusers_modules.local.classifier"
    assert torch.equal(loaded(x, 9), model(x, 9)) and loaded.config.id2label == {"0": "cat", "1": "dog", "2": "wild"}
    loaded.save_pretrained(again)  # the copy saves itself too
    assert torch.equal(AutoModel.from_pretrained(again, trust_remote_code=True)(x, 9), model(x, 9))
    assert torch.equal(NoisyClassifier.from_pretrained(again)(x, 9), model(x, 9))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"block_out_channels": (8,)}, "2 down_block_types and 1 block_out_channels"),
        ({"id2label": {0: "cat", 1: "dog"}}, "names the classes 0, 1; give a name for each class from 0 to 2"),
        ({"id2label": {"cat": 0, "dog": 1, "wild": 2}}, "names the classes cat, dog, wild"),
    ],
)
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        classifier(**config)
