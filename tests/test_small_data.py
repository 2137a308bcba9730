"""Few images: balanced classes and near duplicates."""

import io

import numpy as np
import pytest
import torch
from conftest import TINY, steps
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.batches import balanced_order, training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.duplicates import describe_duplicates, near_duplicates


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
