"""Planted copies are found, named and counted; new images are not taken for copies."""

import itertools
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.evaluation import memorization
from ddpm_hf.evaluation.memorization import memorization_report, pairs_sheet


def images(count, seed, side=4, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def noisy(copies, std, seed):
    noise = std * torch.randn(copies.shape, generator=torch.Generator().manual_seed(seed))
    return (copies + noise).round().clamp(0, 255).to(torch.uint8)


def report(*args, **options):
    return memorization_report(*args, progress=False, **options)


@pytest.mark.parametrize("channels, side", [(1, 4), (3, 20)])  # 1200 numbers are more than one exact product holds
def test_distances_are_those_of_every_pair_whatever_the_chunk(channels, side, monkeypatch):
    generated, train, held_out = (images(count, count, side, channels) for count in (70, 90, 30))
    generated[7] = train[80]
    train[85] = train[80]  # the first one counts, though it is in another chunk
    every = np.zeros((70, 90))
    for g in range(70):
        every[g] = ((generated[g].double() - train.double()) ** 2).mean(dim=(1, 2, 3)).sqrt()
    scores, pairs = report(generated, train, held_out, num_pairs=70)
    assert sorted(pairs, key=lambda pair: pair[0]) == [
        (g, every[g].argmin(), pytest.approx(every[g].min(), rel=1e-14)) for g in range(70)
    ]
    assert pairs[0] == (7, 80, 0.0)
    assert [pair[2] for pair in pairs] == sorted(pair[2] for pair in pairs)
    monkeypatch.setattr(memorization, "CHUNK", 5 * 1200)
    assert report(generated, train, held_out, num_pairs=70) == (scores, pairs)


def test_one_grey_level_in_a_large_black_image_is_no_copy():
    # The products of 4800 such pixels are beyond what float32 counts in ones.
    train = torch.zeros(3, 3, 40, 40, dtype=torch.uint8)
    train[0, 0, 0, 0], train[1, 2, 5, 7], train[2, 1, 3, 3] = 1, 1, 3
    generated = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    generated[0, 2, 5, 7] = 2
    assert report(generated, train, None)[1] == [(0, 1, pytest.approx(1 / 4800**0.5))]
    assert report(train[2:], train[:2], None)[1] == [(0, 0, pytest.approx(10**0.5 / 4800**0.5))]


def test_close_copies_raise_the_share_beyond_the_null():
    train, held_out, generated = images(2000, 0), images(2000, 1), images(1000, 2)
    generated[:50] = train[100:150]
    generated[:25] = noisy(generated[:25], 2, 3)
    scores, pairs = report(generated, train, held_out, num_pairs=50)
    assert 0.045 < scores["share_below_threshold"] < 0.085
    assert scores["share_below_threshold_held_out"] < 0.025
    assert {(g, t) for g, t, _ in pairs} == {(k, 100 + k) for k in range(50)}
    assert [distance for *_, distance in pairs[:25]] == [0] * 25 and pairs[25][2] > 0
    assert scores["exact_copies"] == 25 and scores["duplicates"] == 0
    assert 0.9 < scores["median_ratio"] < 1.02 and abs(scores["median_ratio_held_out"] - 1) < 0.05


def test_many_noisy_copies_collapse_authpct():
    train, held_out = images(1000, 0), images(1000, 1)
    scores, _ = report(noisy(train, 10, 2), train, held_out)
    assert scores["authpct"] < 2 and 40 < scores["authpct_held_out"] < 60  # as near as a training image would be
    assert scores["median_ratio"] < 0.3 and scores["exact_copies"] == 0
    fresh, _ = report(images(1000, 3), train, held_out)
    assert abs(fresh["authpct"] - fresh["authpct_held_out"]) < 8 and abs(fresh["median_ratio"] - 1) < 0.03


def test_the_measures_by_hand():
    # One pixel in use, 16 of them: training images at 0, 10 and 100; distances are in quarters of its difference.
    def at(*values):
        flat = torch.zeros(len(values), 16, dtype=torch.uint8)
        flat[:, 0] = torch.tensor(values)
        return flat.view(-1, 1, 4, 4)

    train, held_out = at(0, 10, 100), at(14, 5, 106, 200)  # 4, 5, 6 and 100 from train
    scores, pairs = report(at(100, 12, 50, 130, 130), train, held_out)
    assert pairs == [(0, 2, 0.0), (1, 1, 0.5), (3, 2, 7.5), (4, 2, 7.5), (2, 1, 10.0)]
    # 40 from 10, whose nearest other is 10 away, is authentic; 30 from 100, whose nearest is 90 away, is not.
    assert scores["authpct"] == pytest.approx(20) and scores["authpct_held_out"] == pytest.approx(50)
    assert scores["threshold"] == pytest.approx((4 + 0.01 * 2) / 4)  # the first and third held-out: 4 and 6
    assert scores["share_below_threshold"] == pytest.approx(0.4) and scores["share_below_threshold_held_out"] == 0
    assert scores["median_ratio"] == pytest.approx(30 / 4) and scores["median_ratio_held_out"] == pytest.approx(5 / 4)
    assert scores["exact_copies"] == 1 and scores["duplicates"] == 2


def test_without_held_out_images_there_are_copies_and_pairs():
    train = images(50, 0)
    scores, pairs = report(torch.cat([train[3:4], images(5, 1), images(2, 1)]), train, None, num_pairs=2)
    assert scores["exact_copies"] == 1 and scores["duplicates"] == 4 and pairs[0] == (0, 3, 0.0) and len(pairs) == 2
    for name in ("share_below_threshold", "authpct", "median_ratio"):
        assert scores[name] is None and scores[name + "_held_out"] is None
    assert scores["threshold"] is None
    assert scores.keys() == report(train, train, images(4, 2))[0].keys()


def test_at_most_so_many_held_out_images_are_used():
    train, held_out = images(50, 0), images(40, 1)
    assert report(train, train, held_out, num_held_out=10)[0]["num_held_out"] == 10
    assert report(train, train, held_out)[0]["num_held_out"] == 40


def test_progress_is_told_if_it_takes_long(capsys, monkeypatch):
    memorization_report(images(3, 0), images(5, 1), None)
    assert capsys.readouterr().err == ""
    start, calls = time.time(), itertools.count()
    # Ten seconds pass between two looks at the clock.
    monkeypatch.setattr(time, "time", lambda: start + 10 * next(calls))
    monkeypatch.setattr("tqdm.std.time", time.time)
    memorization_report(images(3, 0), images(5, 1), None)
    assert "Nearest to generated: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("channels, count", [(1, 6), (3, 2)])
def test_the_sheet_shows_both_images_of_a_pair(tmp_path, channels, count):
    generated, train = images(8, 0, 28, channels), images(9, 1, 28, channels)
    _, pairs = report(generated, train, None, num_pairs=count)
    path = pairs_sheet(generated, train, pairs, tmp_path / "pairs.png")
    picture = Image.open(path)
    assert list(tmp_path.iterdir()) == [path] and picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    for k, image in enumerate([generated[pairs[0][0]], train[pairs[0][1]]]):
        left = 24 + k * (112 + 4)
        assert (pixels[64 : 64 + 112 : 4, left : left + 112 : 4] == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    "generated, train, held_out",
    [
        (images(0, 0), images(5, 1), None),
        (images(3, 0).float(), images(5, 1), None),
        (images(3, 0, side=5), images(5, 1), None),
        (images(3, 0), images(1, 1), None),
        (images(3, 0), images(5, 1), images(3, 2)),
        (images(3, 0), images(5, 1), images(8, 2, channels=3)),
        (images(3, 0), images(5, 1), images(5, 1)),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(generated, train, held_out):
    with pytest.raises(UserError, match=r": give (at least \d, uint8|images) .*\.$"):
        report(generated, train, held_out)
