"""Few images: balanced classes, near duplicates, and augmentation that the drawn images do not show."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import TINY, steps, untrained_unet
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.augment import augment, draw_matrix, transform
from ddpm_hf.data.batches import balanced_order, training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.duplicates import describe_duplicates, near_duplicates
from ddpm_hf.models.augmented import without_augmentation
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.randomness import keyed_generator
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import open_run


def counts(rows, labels):
    return torch.bincount(labels[rows] + 1, minlength=4).tolist()


def test_17_to_1_becomes_fair():
    labels = torch.tensor([0] * 170 + [1] * 10 + [-1] * 20 + [2] * 1)
    uses = torch.zeros(len(labels))
    for epoch in range(40):
        rows = balanced_order(3, epoch, len(labels), labels)
        without, *classes = counts(rows, labels)
        assert len(rows) == len(labels) and without == 20 and max(classes) - min(classes) <= 1
        uses += torch.bincount(rows, minlength=len(labels))
        # within an epoch no image of a class is used twice more often than another
        once = torch.bincount(rows, minlength=len(labels))
        assert once[:170].max() <= 1 and once[170:180].max() - once[170:180].min() <= 1
    assert uses[:170].min() > 0 and uses[:170].std() < 4  # each epoch draws other images of the large class
    assert not torch.equal(rows, balanced_order(3, 0, len(labels), labels))
    assert torch.equal(rows, balanced_order(3, 39, len(labels), labels.clone()))


def test_balanced_batches_do_not_depend_on_where_a_run_was_cut(tmp_path):
    config = parse_config([*TINY, "--balance_classes", "--class_names=0,8", "--train_batch_size=7"])
    images, _ = load_images(config)
    images.labels = torch.where(torch.arange(len(images)) < 12, 0, 1)
    whole = training_batches(images, config, 0, 0, 1)
    labels = torch.cat([next(whole)["labels"] for _ in range(len(images) // 7)])
    assert abs(labels.float().mean() - 0.5) < 0.02
    expected = next(whole)
    again = next(training_batches(images, config, int(expected["ordinals"][0]), 0, 1))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_balancing_without_classes_is_refused(tmp_path):
    for k in range(8):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(tmp_path / f"{k}.png")
    with pytest.raises(UserError, match="--balance_classes needs images with classes, but these images have none"):
        steps(0, f"--dataset_name={tmp_path}", "--balance_classes")
    with pytest.raises(SystemExit):
        parse_config([*TINY, "--balance_classes", "--streaming"])


def jpeg(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=95, subsampling=0)
    return np.asarray(Image.open(file))


def test_near_duplicates_are_found_and_named(tmp_path, capsys):
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(each).resize((32, 32), Image.BICUBIC)) for each in smooth]
    for k, each in enumerate(smooth):
        Image.fromarray(each).save(tmp_path / f"{k:02}.png")
    Image.fromarray(jpeg(smooth[4])).save(tmp_path / "again.png")
    Image.fromarray((smooth[4] * 0.7 + 20).astype(np.uint8)).save(tmp_path / "darker.png")
    for k in range(2):  # of one colour: nothing to compare
        Image.fromarray(np.full((32, 32, 3), 9 * k, np.uint8)).save(tmp_path / f"flat{k}.png")
    run, _ = steps(0, f"--dataset_name={tmp_path}", "--resolution=32", f"--output_dir={tmp_path.with_name('run')}")
    said = capsys.readouterr().out
    assert said.count("near duplicates") == 1 and "Hint: 2 of the training images are near duplicates" in said
    names = [[name.split("(")[1] for name in pair] for pair in run.facts["near_duplicates"]]
    assert names == [["04.png)", "again.png)"], ["04.png)", "darker.png)"], ["again.png)", "darker.png)"]]
    assert describe_duplicates([]) == []


def test_near_duplicates_are_those_of_every_pair():
    random = torch.randn(700, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    for first, copy in [(3, 650), (10, 11), (600, 640)]:
        random[copy] = 2 * random[first] + 0.01 * random[0] + 5
    assert near_duplicates(random) == [(3, 650), (10, 11), (600, 640)]
    assert near_duplicates(random[:1]) == [] and near_duplicates(torch.zeros(3, 1, 4, 4)) == []


def test_near_duplicates_among_images_of_many_channels_are_found_quickly():
    """The time grows with the number of channels, not with its third power, which took 100 GB here."""
    random = torch.randn(6, 1500, 8, 8, generator=torch.Generator().manual_seed(0))
    random[4] = random[1] + 0.01
    assert near_duplicates(random) == [(1, 4)]


def test_an_affine_map_moves_pixels_as_its_numbers_say():
    image = torch.randn(1, 2, 6, 8)
    same = torch.eye(2, 3)
    assert torch.allclose(transform(image, same), image, atol=1e-5)
    assert torch.allclose(transform(image, torch.tensor([[-1.0, 0, 0], [0, 1, 0]])), image.flip(3), atol=1e-5)
    shifted = transform(image, torch.tensor([[1.0, 0, 2 / 8], [0, 1, 0]]))  # one pixel to the left
    assert torch.allclose(shifted[..., :-1], image[..., 1:], atol=1e-5)
    matrices = [draw_matrix(keyed_generator(0, "m", k), (6, 8)) for k in range(500)]
    area = torch.stack([matrix[:, :2].det().abs().log2() for matrix in matrices])
    assert abs(area.std() - 0.4) < 0.04 and abs(area.mean()) < 0.06  # twice the spread of one side
    shift = torch.stack([matrix[:, 2] for matrix in matrices])
    assert abs(shift.std() - 0.25) < 0.02
    assert abs(torch.stack([matrix[:, :2].det() < 0 for matrix in matrices]).float().mean() - 0.5) < 0.07


def test_augmentation_is_keyed_by_the_ordinal():
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = {"ordinals": torch.arange(100, 164), "images": images.clone()}
    whole = augment(whole, 0.3, 5)
    part = {"ordinals": whole["ordinals"][20:30], "images": images[20:30].clone()}
    part = augment(part, 0.3, 5)
    assert torch.equal(part["images"], whole["images"][20:30])
    assert torch.equal(part["augmented"], whole["augmented"][20:30])
    changed = (whole["images"] != images).flatten(1).any(1)
    assert torch.equal(changed, whole["augmented"]) and 8 < changed.sum() < 32


def test_what_is_published_is_stock_and_draws_images_as_they_are():
    """The published UNet equals the trained one that is told `not augmented`, with and without classes."""
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9])
    for is_conditional, embeddings in {False: 2, True: 8}.items():
        unet = untrained_unet(8, num_class_embeds=embeddings).eval()
        published = without_augmentation(unet, is_conditional)
        stock = UNet2DModel.from_config(published.config).eval()
        stock.load_state_dict(published.state_dict())
        assert stock.config.num_class_embeds == (4 if is_conditional else None)
        labels = torch.tensor([0, 2, 3]) if is_conditional else None
        with torch.no_grad():
            told = unet(x, t, torch.zeros(3).long() if labels is None else labels).sample
            assert torch.allclose(stock(x, t, labels).sample, told, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--class_conditional"]])
def test_training_tells_the_model_and_resumes_exactly(flags, tmp_path):
    """In the table of embeddings, both halves learn. The pipeline, the checkpoint and the run have the same images."""
    words = [*TINY, *flags, "--augment_probability=0.5", "--max_train_steps=2", "--checkpointing_steps=1", "--use_ema"]
    words += [f"--output_dir={tmp_path / 'run'}", "--validation_split=0.1"]
    train(parse_config(words))
    run = load_pretrained(tmp_path / "run")
    other = load_pretrained(tmp_path / "run" / "checkpoint-2")
    assert run.facts["unet_sha256"] == other.facts["unet_sha256"]
    assert run.unet.config.num_class_embeds == other.classes.num_embeddings or not flags
    assert bool(run.classes) == bool(flags) and len(run.classes) == (10 if flags else 0)
    index = json.loads((tmp_path / "run" / "unet" / "config.json").read_text())
    assert index["num_class_embeds"] == (11 if flags else None)
    again = open_run(parse_config([*words, f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"]))
    again.lock.close()
    assert len(again.network.class_embedding.weight) == (22 if flags else 2)


def test_an_augmented_run_is_the_same_whether_cut_or_not(tmp_path):
    words = ["--augment_probability=0.4", f"--output_dir={tmp_path}"]
    one, _ = steps(4, *words)
    start = one.network.class_embedding.weight
    assert len(start) == 2 and not torch.equal(start[0], start[1])
    two, _ = steps(4, *words)
    assert torch.equal(one.network.conv_in.weight, two.network.conv_in.weight)
    untouched, _ = steps(4, f"--output_dir={tmp_path}")
    assert not torch.equal(one.network.conv_in.weight, untouched.network.conv_in.weight)
