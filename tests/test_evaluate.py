"""Evaluation as users run it: in one process and in three, from a model and from files; records and errors."""

import json
import math
import os
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, make_run
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from processes import ended, launch, start_together
from sklearn.datasets import load_sample_images
from torchmetrics.image.fid import FrechetInceptionDistance

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation import compare
from ddpm_hf.evaluation.cifar10_classifier import Cifar10Classifier
from ddpm_hf.evaluation.class_scores import class_counts
from ddpm_hf.evaluation.digit_classifier import DigitClassifier
from ddpm_hf.evaluation.extractor import EXTRACTORS
from ddpm_hf.evaluation.features import extract, images_at
from ddpm_hf.evaluation.inputs import match_channels
from ddpm_hf.evaluation.metrics import in_words
from ddpm_hf.evaluation.records import COPYING, NOTHING_KNOWN, read_record, record_table
from ddpm_hf.evaluation.reference import read_reference, reference_of, save_reference
from ddpm_hf.evaluation.small_classifier import load_weights
from ddpm_hf.evaluation.statistics import frechet_distance, mean_and_covariance
from ddpm_hf.sampling.sample_set import read_samples
from ddpm_hf.sharing.card_scores import eval_result


SMALL = ["--suite=smoke", "--num_images=40", "--num_inference_steps=3", "--bound_images=12", "--bound_timesteps=5"]
METRICS = "fid,fd_mnist,kid,precision_recall,bits_per_dim,memorization"


def evaluate(*arguments):
    main(["evaluate", *map(str, arguments)])


def values(path):
    return {entry["id"]: entry["value"] for entry in json.loads(path.read_text())["metrics"] if "value" in entry}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def record(tiny_run, tmp_path_factory):
    """The record of a small evaluation of the tiny run, all that can be had offline."""
    folder = tmp_path_factory.mktemp("records")
    path = folder / "one.json"
    evaluate(
        tiny_run,
        *SMALL,
        "--batch_size",
        32,
        "--metrics",
        METRICS,
        "--output",
        path,
        "--samples_dir",
        folder / "samples",
    )
    return path


@pytest.fixture(scope="module")
def digits(digit_folder):
    return load_images(TrainingConfig(dataset_name=str(digit_folder), resolution=28, validation_split="test"))


def test_a_record_says_what_was_measured(record, digit_folder, tiny_run):
    content = read_record(record)
    assert content["sampler"]["method"] == "ddim" and content["sampler"]["num_inference_steps"] == 3
    assert content["data"]["train"]["n"] == 120 and content["data"]["held_out"]["n"] == 60
    assert content["data"]["name"] == digit_folder.name and str(digit_folder.parent) not in record.read_text()
    assert content["extractors"]["digits"]["sha256"] == load_weights(DigitClassifier).sha256
    entries = {entry["id"]: entry for entry in content["metrics"]}
    fd = entries["fd_mnist-9ea1c6a6_40_full"]
    assert (fd["n_gen"], fd["n_ref"]) == (40, 120) and fd["se"] > 0 and fd["value"] > fd["floor"] > 0
    assert {"class_total_variation", "coverage40_k3_digits", "bits_per_dim", "memorization_authpct"} <= entries.keys()
    assert entries["bits_per_dim"]["extra"]["split"] == "held_out"
    assert record.with_suffix(".pairs.png").is_file()


def test_a_picture_that_cannot_be_written_loses_no_scores(record, tiny_run, tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (record.with_suffix(".pairs.png").stat().st_size - 1, limit[1]))
    try:
        samples = ["--from_samples", record.parent / "samples"]
        evaluate(tiny_run, *samples, "--metrics", "memorization", "--output", tmp_path / "r.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Warning: a picture could not be written to" in capsys.readouterr().out
    (first, *_) = read_record(tmp_path / "r.json")["metrics"]
    assert first["value"] is not None and len(first["extra"]["pairs"]) > 0 and "sheet" not in first["extra"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_missing_weights_skip_a_metric_and_say_why_once(record, tiny_run, tmp_path, capsys):
    (skipped,) = [entry for entry in read_record(record)["metrics"] if entry.get("status") == "skipped"]
    assert skipped["id"] == "fid" and "--inception" in skipped["reason"]
    with pytest.raises(SystemExit) as exit:
        flags = ["--from_samples", record.parent / "samples", "--metrics", "fid,memorization", "--require", "fid"]
        evaluate(tiny_run, *flags, "--output", tmp_path / "r.json")
    said = capsys.readouterr()
    assert exit.value.code == 1 and "fid is required" in said.err
    assert said.out.count("Warning: fid will be skipped: ") == said.out.count(skipped["reason"]) == 1
    assert "\nskipped: fid. The warning above and the record say why.\n" in said.out
    assert (tmp_path / "r.json").is_file()


def test_nothing_is_drawn_for_what_will_be_skipped(tiny_run, tmp_path, capsys):
    evaluate(tiny_run, "--metrics", "fid", "--output", tmp_path / "r.json", "--samples_dir", tmp_path / "samples")
    assert not (tmp_path / "samples").exists() and "fid will be skipped" in capsys.readouterr().out
    assert read_record(tmp_path / "r.json")["metrics"][0]["status"] == "skipped"


@pytest.fixture
def again(tiny_run, tmp_path):
    """The arguments that make the record once more, in `tmp_path`."""
    flags = [*SMALL, "--batch_size", 32, "--metrics", METRICS, "--cache_dir", tmp_path / "cache"]
    return ["evaluate", tiny_run, *flags, "--output", tmp_path / "one.json", "--samples_dir", tmp_path / "samples"]


def test_two_processes_of_a_launcher_come_to_the_same_numbers_without_the_tests_packages(record, again, tmp_path):
    blocked = "scipy", "torchvision", "torch_fidelity", "torchmetrics"
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({blocked}))")
    launch("-m", "ddpm_hf", *again, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert_same_numbers(record, tmp_path, 2)


def test_three_processes_of_which_one_is_idle_come_to_the_same_numbers(record, again, tmp_path):
    log = tmp_path / "log"
    ended(start_together(log, *again, program="ddpm_hf.__main__", processes=3), log)
    assert_same_numbers(record, tmp_path, 3)


def assert_same_numbers(record, folder, processes):
    one, several = read_record(record), read_record(folder / "one.json")
    assert several["env"]["processes"] == processes and one["samples"] == several["samples"]
    images = [Image.open(path).tobytes() for path in sorted((folder / "samples").glob("*.png"))]
    assert len(images) == len(set(images)) == 40
    several = {entry["id"]: entry for entry in several["metrics"]}
    for entry in one["metrics"]:
        if entry["id"] == "bits_per_dim":  # its batches are shared out by image, and round differently
            assert several["bits_per_dim"]["value"] == pytest.approx(entry["value"], rel=1e-6)
        else:
            assert several[entry["id"]] == entry


def test_anyone_can_check_a_number_from_the_samples(record, tiny_run, digit_folder, tmp_path):
    flags = ["--metrics", "fd_mnist,memorization", "--dataset_name", digit_folder, "--validation_split", "test"]
    evaluate(record.parent / "samples", *flags, "--output", tmp_path / "again.json")
    again, first = values(tmp_path / "again.json"), values(record)
    assert again.keys() <= first.keys() and len(again) > 8
    # The batch has 64 images here and had 32 there: on some processors float32 then rounds differently.
    assert again == pytest.approx({id: first[id] for id in again}, rel=1e-6)
    assert read_record(tmp_path / "again.json")["model"] == read_record(record)["model"]


def test_the_distance_is_that_of_the_features(record, digit_folder):
    classifier = load_weights(DigitClassifier)
    train, _ = load_images(TrainingConfig(dataset_name=str(digit_folder), resolution=28, validation_split="test"))
    samples = [np.asarray(Image.open(path)) for path in sorted((record.parent / "samples").glob("*.png"))]
    features = [classifier(images)[0] for images in (torch.tensor(np.stack(samples))[:, None], train.pixels)]
    distance, _ = frechet_distance(*mean_and_covariance(features[0]), *mean_and_covariance(features[1]))
    assert values(record)["fd_mnist-9ea1c6a6_40_full"] == pytest.approx(distance, rel=1e-5)


def test_calibration_is_the_floor(digit_folder, tmp_path, capsys):
    flags = ["--dataset_name", digit_folder, "--validation_split", "test", "--resolution", 28]
    evaluate("--calibrate", *flags, "--metrics", "fd_mnist", "--num_images", 60, "--output", tmp_path / "c.json")
    entry = read_record(tmp_path / "c.json")["metrics"][0]
    assert entry["value"] == pytest.approx(entry["floor"]) and entry["value"] > 0
    assert "Scoring at 28x28: real images of other sizes are resized." in capsys.readouterr().out


def test_bits_per_dim_in_full_is_what_few_timesteps_estimate(tiny_run, tmp_path):
    def bits(name, timesteps):
        flags = ["--metrics", "bits_per_dim", "--bound_images", 30, "--bound_timesteps", timesteps]
        evaluate(tiny_run, *flags, "--output", tmp_path / name)
        return read_record(tmp_path / name)["metrics"][0]

    full, few = bits("full.json", 0), bits("few.json", 12)
    assert full["extra"]["mode"] == "full" and full["extra"]["L0"] == pytest.approx(few["extra"]["L0"], rel=1e-6)
    assert few["value"] == pytest.approx(full["value"], rel=0.1) and few["value"] != full["value"]


def test_nothing_is_overwritten_without_a_flag(record, tiny_run, capsys):
    before = record.read_bytes()
    with pytest.raises(SystemExit) as exit:
        evaluate(tiny_run, *SMALL, "--output", record)
    assert exit.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert record.read_bytes() == before


def test_records_of_a_run_lie_in_its_folder_under_names_of_their_own(tiny_run):
    for _ in range(2):
        evaluate(tiny_run, *SMALL, "--metrics", "fd_mnist")
    assert len(list((tiny_run / "evaluations").glob("ddim3-*-40*.json"))) == 2


# Through Inception's place, with a small network in it: the real one takes minutes for so many images


class SmallNetwork(torch.nn.Module):
    name, sha256, num_features = "inception", "0" * 64, 16

    def __init__(self, weights=None, pipeline="tf1"):
        super().__init__()
        self.pipeline = pipeline
        self.table = torch.randn(28 * 28, 16, generator=torch.Generator().manual_seed(0)) / 28

    def forward(self, images):
        features = torch.tanh((images.flatten(1) / 127.5 - 1) @ self.table)
        return features, 5 * features[:, :10]

    def features_of(self, images):
        return self(images)[0]


@pytest.fixture
def small_inception(monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "inception", SmallNetwork)
    return SmallNetwork()


def entries_of(path):
    return {entry["id"]: entry for entry in read_record(path)["metrics"]}


def test_scores_through_inception_are_those_of_torchmetrics(record, tiny_run, digits, small_inception, tmp_path):
    names = "fid,inception_score,kid,precision_recall"
    flags = ["--from_samples", record.parent / "samples", "--features", "inception", "--cache_dir", tmp_path]
    evaluate(tiny_run, *flags, "--metrics", names, "--output", tmp_path / "r.json")
    found = entries_of(tmp_path / "r.json")
    wanted = {"fid40_full", "fid40_test", "is40", "kid40_full", "precision40_k3_inception", "recall40_k3_inception"}
    assert wanted <= found.keys() and found["fid40_full"]["se"] > 0 and found["fid40_test"]["n_ref"] == 60
    generated = read_samples(record.parent / "samples").images
    for id, real in [("fid40_full", digits[0]), ("fid40_test", digits[1])]:
        oracle = FrechetInceptionDistance(feature=Wrapped(small_inception)).set_dtype(torch.float64)
        oracle.update(real.pixels, real=True)
        oracle.update(generated, real=False)
        assert found[id]["value"] == pytest.approx(float(oracle.compute()), rel=1e-5)


class Wrapped(torch.nn.Module):
    """What torchmetrics takes: a module from images to features."""

    def __init__(self, network):
        super().__init__()
        self.network, self.num_features = network, 16

    def forward(self, images):
        return self.network(images.to(torch.uint8))[0].double()


def test_foreign_statistics_stand_in_for_the_training_images(record, tiny_run, digits, small_inception, tmp_path):
    features = small_inception.features_of(digits[0].pixels).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    flags = ["--from_samples", record.parent / "samples", "--metrics", "fid", "--cache_dir", tmp_path]
    evaluate(tiny_run, *flags, "--output", tmp_path / "own.json")
    given = ["--reference", tmp_path / "stats.npz", "--reference_pipeline", "tf1"]
    evaluate(tiny_run, *flags, *given, "--output", tmp_path / "given.json")
    own, foreign = (entries_of(tmp_path / name)["fid40_full"] for name in ("own.json", "given.json"))
    assert foreign["value"] == pytest.approx(own["value"], rel=1e-6)
    with pytest.raises(SystemExit):
        evaluate(tiny_run, *flags, *given, "--inception_pipeline", "pytorch", "--output", tmp_path / "no.json")
    evaluate(tiny_run, *flags, "--inception_pipeline", "pytorch", "--output", tmp_path / "other.json")
    assert "fid40_full_pytorch" in entries_of(tmp_path / "other.json")


def test_floors_do_not_depend_on_the_order_of_the_files(tiny_run, record, digits, tmp_path, monkeypatch):
    """Folders come class by class: the first images of the held-out ones would be of few classes."""
    flags = ["--from_samples", record.parent / "samples", "--metrics", "fd_mnist,kid"]
    evaluate(tiny_run, *flags, "--output", tmp_path / "r.json")
    found = entries_of(tmp_path / "r.json")
    assert digits[1].labels.diff().min() >= 0  # class by class
    features, _ = load_weights(DigitClassifier)(digits[1].pixels[:40])
    train, _ = load_weights(DigitClassifier)(digits[0].pixels)
    prefix, _ = frechet_distance(*mean_and_covariance(features), *mean_and_covariance(train))
    assert found["fd_mnist-9ea1c6a6_40_full"]["floor"] < 0.7 * prefix
    assert found["class_total_variation"]["floor"] < 0.25


def test_digits_of_a_subset_are_counted_by_their_names(digit_folder):
    config = TrainingConfig(dataset_name=str(digit_folder), resolution=28, class_names=["3", "7"])
    train, _ = load_images(config)
    counts = class_counts(train, None, tuple("0123456789"))
    assert counts[3] > 0 and counts[7] > 0 and counts.sum() == len(train) == counts[3] + counts[7]


def test_color_images_of_ten_classes_have_the_scores_of_cifar10(tmp_path):
    """The classes of these photos are not those that they show, so only the numbers that depend on classes are odd."""
    names = load_weights(Cifar10Classifier).class_names
    for k in range(120):
        photo = load_sample_images().images[k % 2][k : k + 32, 3 * k : 3 * k + 32]
        path = tmp_path / "data" / ("train", "test")[k // 2 % 2] / names[k % 10] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(path)
    flags = ["--dataset_name", tmp_path / "data", "--validation_split", "test", "--resolution", 32]
    evaluate("--calibrate", *flags, "--num_images", 60, "--features", "cifar10", "--output", tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["extractors"]["cifar10"]["sha256"] == load_weights(Cifar10Classifier).sha256
    entries = {entry["id"]: entry for entry in content["metrics"]}
    distance = entries[f"fd_cifar10-{load_weights(Cifar10Classifier).sha256[:8]}_60_full"]
    assert distance["value"] > 0 and distance["floor"] == pytest.approx(distance["value"])
    assert 0 <= entries["class_total_variation"]["value"] <= 1 and "kid60_full_cifar10" in entries
    assert any(entry["id"].startswith("coverage60") for entry in content["metrics"])


def test_an_undefined_distance_is_not_a_perfect_one():
    nan, identity = torch.tensor([float("nan")]), torch.eye(1)
    assert math.isnan(frechet_distance(nan, identity, torch.zeros(1), identity)[0])


def test_images_that_do_not_fit_in_memory_are_decoded_in_chunks(digits, monkeypatch):
    wanted = images_at(digits[0], range(120))
    monkeypatch.setattr(digits[0], "pixels", None)
    monkeypatch.setattr("ddpm_hf.evaluation.features.CHUNK", 50)
    assert torch.equal(images_at(digits[0], range(120)), wanted)


# References


def test_a_reference_is_computed_once_and_read_by_pytorch_fid_and_edm(digits, tmp_path):
    classifier = load_weights(DigitClassifier)
    first = reference_of(classifier, digits[0], "train", cache_dir=tmp_path)
    (path,) = (tmp_path / "references").glob("*.npz")
    classifier.forward = None  # it is not asked again
    again = reference_of(classifier, digits[0], "train", cache_dir=tmp_path)
    assert torch.equal(first.covariance, again.covariance) and torch.equal(first.features, again.features)
    with ThreadPoolExecutor(4) as pool:  # as if four commands had computed it
        list(pool.map(lambda _: save_reference(first, path), range(8)))
    assert list(path.parent.iterdir()) == [path]
    with np.load(path) as file:  # what both of them do
        assert file["mu"].shape == (64,) and file["sigma"].dtype == np.float64
        assert np.allclose(file["sigma"], np.cov(first.features.double().numpy(), rowvar=False))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_matter_to_features(digits, batch_size):
    classifier = load_weights(DigitClassifier)
    whole = extract(classifier, digits[0]).features
    assert torch.allclose(extract(classifier, digits[0], batch_size=batch_size).features, whole, atol=1e-5)


def statistics(path, d=64, **more):
    np.savez(path, mu=np.zeros(d), sigma=np.eye(d), **more)
    return path


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda path: statistics(path, d=2048), "of 2048 features, but digits has 64"),
        (lambda path: statistics(path), "does not say how its images were resized"),
        (
            lambda path: statistics(path, meta=json.dumps({"pipeline": "tf1"})),
            "made with the pipeline tf1, but the samples use 28px",
        ),
        (lambda path: np.savez(path, feats=np.zeros(3)) or path, "no mu and sigma"),
        (lambda path: path.write_bytes(b"PK no") and path, "cannot be read as .npz"),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path, make, wanted):
    with pytest.raises(UserError, match=wanted):
        read_reference(make(tmp_path / "stats.npz"), load_weights(DigitClassifier))


def test_foreign_statistics_are_read_with_a_pipeline(tmp_path):
    found = read_reference(statistics(tmp_path / "stats.npz"), load_weights(DigitClassifier), "28px")
    assert found.mean.shape == (64,) and found.features is None


# Comparisons


def test_unlike_protocols_are_refused_naming_the_field(record):
    one = read_record(record)
    other = json.loads(json.dumps(one))
    other["sampler"]["num_inference_steps"] = 50
    with pytest.raises(UserError, match="sampler.num_inference_steps is 3 and 50"):
        compare.comparison({"a": one, "b": other})
    table = compare.comparison({"a": one, "b": other}, vary=["sampler"])
    assert "sampler.num_inference_steps" in table and "fd_mnist-9ea1c6a6_40_full" in table
    other["data"]["train"]["fingerprint"] = "another"
    with pytest.raises(UserError, match="data.train.fingerprint"):
        compare.comparison({"a": one, "b": other}, vary=["sampler"])


@pytest.mark.parametrize(
    "name", ["<!--", "```", "[x](http://y)", "|", "a\n# b", "<b>", "\\|", "**b**", "a_b", "http://y"]
)
def test_names_cannot_change_a_markdown_table(record, name):
    markdown_it = pytest.importorskip("markdown_it")

    def kinds_of(text):
        """Return the kinds of all that a table with `text` in every place is made of, but plain text and code."""
        one = read_record(record)
        other = json.loads(json.dumps(one))
        other["model"]["name"] = other["data"]["name"] = text
        for each in (one, other):
            each["metrics"].append(each["metrics"][0] | {"id": text})
        table = compare.comparison({text: one, f"2 {text}": other}, vary=["data"], markdown=True)
        tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(table)
        kinds = [token.type for token in tokens]
        for token in tokens:
            kinds += [child.type for child in token.children or []]
        return [kind for kind in kinds if kind not in ("text", "code_inline")]

    assert kinds_of(name) == kinds_of("cat")


def test_vary_must_name_a_field(record):
    one = read_record(record)
    for word, wanted in {
        "smapler": "did you mean sampler?",
        "sampler.steps": "did you mean",
        "zzz": "give sampler,",
    }.items():
        with pytest.raises(UserError, match=f"--vary {word} is not a field of these records: {re.escape(wanted)}"):
            compare.comparison({"a": one, "b": one}, vary=[word])


def test_vary_takes_what_the_error_recommends_and_shows_the_values_that_differ(record):
    one = read_record(record)
    other = json.loads(json.dumps(one))
    other["sampler"]["num_inference_steps"] = 50
    entry = next(entry for entry in other["metrics"] if entry["id"].startswith("fd_mnist"))
    entry["n_ref"] = 77
    other["model"] |= {"weights": "raw", "train_step": 12}
    with pytest.raises(UserError, match="add --vary") as refused:
        compare.comparison({"a": one, "b": other})
    recommended = re.search(r"--vary (\S+)\.$", str(refused.value))[1].split(",")
    field = f"{entry['id']}.n_ref"
    assert recommended == ["sampler.num_inference_steps", field]
    shown = compare.comparison({"a": one, "b": other}, vary=[*recommended, "model.weights"])
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows[field] == ["120", "77"] and rows["sampler.num_inference_steps"] == ["3", "50"]
    assert rows["model.weights"] == ["published", "raw"] and rows["model.train_step"] == ["-", "12"]


def test_the_table_says_in_words_what_is_better(record):
    shown = record_table(read_record(record)).splitlines()
    assert shown[0].split()[:4] == ["metric", "value", "+-", "better"]
    better = {line.split()[0]: {"lower", "higher"} & set(line.split()) for line in shown[1:] if " 40 " in line}
    assert better["fd_mnist-9ea1c6a6_40_full"] == {"lower"} and better["class_confidence"] == {"higher"}
    assert sum(line.startswith("+-: standard error. better: ") for line in shown) == 1
    # The scores about copying stand apart, without a direction that would be better.
    question = shown.index(COPYING)
    below = [line.startswith("memorization_") for line in shown[question + 1 :]]
    assert (
        below[:5] == [True] * 5
        and sum(below) == 5
        and not any(line.startswith("memorization_") for line in shown[:question])
    )
    assert not any(words for id, words in better.items() if id.startswith("memorization_"))
    assert NOTHING_KNOWN in shown and any(line.startswith("bits_per_dim ") for line in shown[:question])


def test_all_that_differs_is_named_at_once(record):
    one = read_record(record)
    other = json.loads(json.dumps(one))
    other["sampler"] |= {"num_inference_steps": 50, "timesteps": "quad"}
    with pytest.raises(UserError, match="--vary sampler.num_inference_steps,sampler.timesteps"):
        compare.comparison({"a": one, "b": other})


def test_images_of_another_noise_schedule_are_drawn_anew(tiny_run, tmp_path, monkeypatch):
    """The weights are the same, but the images are not, e.g. after a mended conversion."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_run, model)
    few = ["--metrics=memorization", "--num_images=40", "--num_inference_steps=2", "--sampler=ddim"]
    path = model / "scheduler" / "scheduler_config.json"
    first = json.loads(path.read_text())
    hashes = []
    for change in ({}, {"prediction_type": "sample"}, {"beta_schedule": "linear"}, {}):
        path.write_text(json.dumps(first | change))
        main(["evaluate", str(model), *few, f"--output={len(hashes)}.json"])
        hashes.append(read_record(f"{len(hashes)}.json")["samples"]["sha256"])
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3
    main(["sample", str(model), "--num_images=2", "--num_inference_steps=2", "--output=drawn"])
    path.write_text(json.dumps(first | {"prediction_type": "sample"}))
    for words in (
        ["sample", str(model), "--num_images=2", "--num_inference_steps=2", "--output=drawn"],
        ["evaluate", str(model), "--from_samples=drawn", "--metrics=memorization"],
    ):
        with pytest.raises(SystemExit):
            main(words)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inferense_steps": 3}, "num_inference_steps"),
        ({"num_inference_steps": 3}, "applies only to images that are drawn now"),
        ({"sampler": "ddim"}, "applies only to images that are drawn now"),
    ],
)
def test_settings_of_a_sampler_are_refused_for_samples(tiny_run, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    samples = ddpm_hf.sample(tiny_run, 40, "ddim", num_inference_steps=1, output="drawn")
    with pytest.raises(UserError, match=said):
        ddpm_hf.evaluate(tiny_run, samples=samples, metrics=["memorization"], **given)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == []


def test_a_damaged_cache_is_made_anew(tmp_path):
    config = TrainingConfig(dataset_name="digits", resolution=32, class_names=["3"])
    train, _ = load_images(config, 1)
    extractor = load_weights(DigitClassifier)
    first = reference_of(extractor, train, "images", cache_dir=tmp_path)
    (path,) = (tmp_path / "references").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(reference_of(extractor, train, "images", cache_dir=tmp_path).mean, first.mean)
    assert len(read_reference(path).mean) == len(first.mean)


def test_of_other_data_the_error_names_the_data_and_a_short_list_that_compare_accepts(record):
    one = read_record(record)
    other = json.loads(json.dumps(one))
    other["data"] = {**other["data"], "name": "else", "resolution": 8, "train": {"n": 3, "fingerprint": "0"}}
    other["sampler"]["num_inference_steps"] = 50
    for entry in other["metrics"]:
        entry |= {"n_ref": 3, "n_gen": 7} if "n_ref" in entry else {}
    with pytest.raises(UserError) as refused:
        compare.comparison({"a": one, "b": other})
    said = str(refused.value)
    assert re.search(
        r"ways \(data.name is \S+ and else; sampler.num_inference_steps is 3 and 50; .*; and \d+ more\)", said
    )
    assert len(said) < 400
    vary = said.rpartition("--vary ")[2].rstrip(".").split(",")
    assert set(vary) == {"data", "sampler", "n_ref", "n_gen"}
    assert "n_gen" in compare.comparison({"a": one, "b": other}, vary=vary)


def test_other_weights_are_no_other_protocol(record, tmp_path, capsys):
    one = read_record(record)
    other = one | {"model": one["model"] | {"weights": "raw", "unet_sha256": "0"}}
    assert "model.weights" in compare.comparison({"a": one, "b": other})
    main(["compare", str(record), str(shutil.copy(record, tmp_path / "two.json")), "--markdown"])
    assert capsys.readouterr().out.count("|") > 20


@pytest.mark.parametrize(
    ("changed", "shared"), [({"seed": 1}, "39"), ({"seed": 39}, "1"), ({"seed": 40}, None), ({"seed": 0}, None)]
)
def test_seeds_that_share_images_are_told(record, changed, shared):
    one = read_record(record)
    other = one | {"sampler": one["sampler"] | changed}
    assert (one["sampler"]["seed"], one["samples"]["n"]) == (0, 40)
    for first, second in ((one, other), (other, one)):
        text = compare.comparison({"a": first, "b": second})
        assert f"draw {shared} of their images from the same noise" in text or shared is None and "Warning" not in text
    another = other | {"model": other["model"] | {"unet_sha256": "0"}}
    assert "Warning" not in compare.comparison({"a": one, "b": another})
    fewer = other | {"sampler": other["sampler"] | {"num_inference_steps": 2}}
    assert "Warning" not in compare.comparison({"a": one, "b": fewer}, vary=["sampler"])


def test_given_samples_are_not_scored_by_a_bound_unless_asked_for(tiny_run, tmp_path, monkeypatch, capsys):
    """bits_per_dim is a score of the model, and takes longer than all others."""
    monkeypatch.chdir(tmp_path)
    ddpm_hf.sample(tiny_run, 40, "ddim", num_inference_steps=1, output="drawn")
    few = {"bound_images": 2, "bound_timesteps": 2, "suite": "smoke"}
    assert "bits_per_dim" not in ddpm_hf.evaluate(tiny_run, samples="drawn", **few).metrics
    assert ddpm_hf.evaluate(tiny_run, samples="drawn", metrics=["bits_per_dim"], **few).metrics == ["bits_per_dim"]
    capsys.readouterr()
    both = ddpm_hf.evaluate(tiny_run, num_images=40, num_inference_steps=2, **few)
    assert {"bits_per_dim", "memorization"} <= set(both.metrics)
    # 2 images, 2 timesteps each, and a pilot of 2 images at all 20 timesteps: 44 evaluations, 22 images of 2 steps.
    assert "bits_per_dim takes as long as drawing about 22 images; --bound_images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lower_is_better", "values", "errors", "verdict"),
    [
        (True, [1.0, 2.0], [0.3, 0.3], "a"),  # 1 > 2 * 0.3 * sqrt(2) = 0.85
        (False, [1.0, 2.0], [0.3, 0.3], "b"),
        (True, [1.0, 2.0], [0.4, 0.4], "not clear"),  # 2 * 0.4 * sqrt(2) = 1.13
        (True, [1.0, 2.0, 1.1], [0.1, 0.1, 0.1], "not clear"),
        (True, [1.0, 2.0, 1.5], [0.1, 0.1, 0.1], "a"),
        (True, [1.0, 2.0], [None, 0.1], ""),
        (None, [1.0, 2.0], [0.1, 0.1], ""),
        (True, [1.0], [0.1], ""),
        (True, [1.0, 2.0, None], [0.1, 0.1, 0.1], "a"),
    ],
)
def test_a_record_is_best_only_beyond_the_errors(lower_is_better, values, errors, verdict):
    entries = {
        name: {"id": "x", "value": value, "se": error, "lower_is_better": lower_is_better}
        for name, value, error in zip("abc", values, errors)
    }
    assert compare.best(entries) == verdict
    copying = {name: entry | {"id": "memorization_duplicates"} for name, entry in entries.items()}
    assert compare.best(copying) == compare.direction(copying) == ""


def test_the_table_says_which_direction_is_better_and_shortens_hashes(record):
    one = read_record(record)
    other = json.loads(json.dumps(one)) | {"model": one["model"] | {"unet_sha256": "0123456789abcdef" * 4}}
    entry = next(entry for entry in other["metrics"] if entry["id"] == "bits_per_dim")
    entry["value"] -= 10 * entry["se"]
    table = compare.comparison({"a": one, "b": other}, vary=["model"])
    lines = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert lines["bits_per_dim"][-2:] == ["lower", "b"]
    assert lines["model.unet_sha256"][-1] == "0123456789ab"
    assert "standard errors of their difference" in table
    # A metric that a record skipped does not hide the best of the others.
    skipped = json.loads(json.dumps(one))
    skipped["metrics"] = [{"id": "bits_per_dim", "status": "skipped", "reason": "any"}]
    three = compare.comparison({"a": one, "b": other, "c": skipped})
    assert [line.split()[-2:] for line in three.splitlines() if "bits" in line] == [["lower", "b"]]
    # Images of a class without guidance have the scale 1, which is not recorded.
    plain, guided = (json.loads(json.dumps(one)) for _ in range(2))
    plain["sampler"]["class_labels"] = guided["sampler"]["class_labels"] = [0]
    guided["sampler"]["guidance_scale"] = 2.0
    with pytest.raises(UserError, match="sampler.guidance_scale is 1.0 and 2.0"):
        compare.comparison({"a": plain, "b": guided})
    # A record without the facts of its sampler says so in words.
    bare = json.loads(json.dumps(one)) | {"sampler": {}}
    with pytest.raises(UserError, match="sampler.method is ddim and not recorded"):
        compare.comparison({"a": one, "b": bare})


def test_a_metric_that_one_lacks_is_a_gap_and_how_the_bound_was_taken_is_protocol(record):
    one = read_record(record)
    fewer = one | {"metrics": [entry for entry in one["metrics"] if entry["id"] != "bits_per_dim"]}
    assert " -" in compare.comparison({"a": one, "b": fewer})
    full = json.loads(json.dumps(one))
    next(entry for entry in full["metrics"] if entry["id"] == "bits_per_dim")["extra"]["mode"] = "full"
    with pytest.raises(UserError, match="bits_per_dim.mode"):
        compare.comparison({"a": one, "b": full})


def test_n_is_protocol(record):
    one = read_record(record)
    other = json.loads(json.dumps(one))
    next(entry for entry in other["metrics"] if entry["id"] == "bits_per_dim")["n_ref"] = 7
    with pytest.raises(UserError, match="bits_per_dim.n_"):
        compare.comparison({"a": one, "b": other})


@pytest.mark.parametrize(
    "id, words",
    [
        ("fid50k_full", "FID"),
        ("fid2048_test", "FID, to held-out images"),
        ("kid10k_full_digits", "KID"),
        ("is2k", "Inception score"),
        ("isotropy", None),
        ("fd_mnist-0a1b2c3d_2k_full", "Fréchet distance of a digit classifier's features"),
    ],
)
def test_a_score_has_words(id, words):
    assert in_words(id) == words


def test_numbers_survive_the_hub_s_card(record):
    one = read_record(record)
    results = [eval_result(one, entry) for entry in one["metrics"] if "value" in entry]
    data = ModelCardData(model_name="tiny", eval_results=results)
    back = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    found = {(result.metric_type, result.metric_name): result for result in back}
    assert len(found) == len(results)
    for result in results:
        twin = found[result.metric_type, result.metric_name]
        assert twin.metric_value == result.metric_value and twin.metric_args == result.metric_args


# Refusals


def folder_of(tmp_path, *images, suffix=".png"):
    for k, image in enumerate(images):
        image.save(tmp_path / f"{k}{suffix}")
    return tmp_path


def nested(folder, *names):
    """Make files below a folder, each with the content of a PNG."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (28, 28)).save(folder / name, format="PNG")
    return folder


def test_grey_samples_of_other_programs_are_read_as_grey(digits, digit_folder, tmp_path):
    """With three equal channels, opaque alpha or a palette, in class subfolders, with upper-case names, or as .npz."""
    pixels = digits[1].pixels[:, 0].numpy()
    for k, image in enumerate(pixels):
        grey = Image.fromarray(image)
        image = [grey.convert("RGB"), grey.convert("RGB").convert("RGBA"), grey.convert("P")][k % 3]
        (tmp_path / "other" / str(k // 30)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "other" / str(k // 30) / f"{k:02d}.PNG", format="PNG")
    (tmp_path / "other" / "0" / "._00.png").write_text("a resource fork")
    np.savez(tmp_path / "other.npz", arr_0=np.repeat(pixels[..., None], 3, axis=-1))
    for name in ("other", "other.npz"):
        found = read_samples(tmp_path / name).images
        assert found.shape[1] == 3 and torch.equal(match_channels(found, digits[0]), digits[1].pixels)
    flags = ["--dataset_name", digit_folder, "--metrics", "memorization", "--output", tmp_path / "r.json"]
    evaluate(tmp_path / "other", *flags)
    assert json.loads((tmp_path / "r.json").read_text())["data"]["channels"] == 1


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda folder: folder_of(folder), "has no PNG files"),
        (lambda folder: folder_of(folder, Image.new("L", (28, 28)), Image.new("L", (32, 28))), "mixes images"),
        (lambda folder: folder_of(folder, Image.new("L", (28, 28)), Image.new("RGB", (28, 28))), "mixes images"),
        (lambda folder: folder_of(folder, Image.new("L", (28, 28)), suffix=".jpg"), "lossy"),
        (lambda folder: folder_of(folder, Image.new("RGBA", (28, 28))), "has the mode RGBA"),
        (
            lambda folder: folder_of(folder, Image.new("RGB", (28, 28), "red")),
            "samples are in color, 28x28, but the real images are grey, 28x28",
        ),
        (lambda folder: nested(folder, "cat/1.png", "2.PNG"), "directly in it and in its subfolder cat: give"),
        (lambda folder: nested(folder, "a/1.png", "a/samples.json"), "has sets of samples in its subfolders"),
        (lambda folder: nested(folder, "samples/1.png", "train_config.json"), "has no PNG files"),
        (lambda folder: nested(folder, "a/1.png", "a/2.jpg"), "lossy format (2.jpg)"),
        (lambda folder: folder_of(folder, Image.new("L", (28, 28))), "at least 40"),
        (lambda folder: folder / "nothing", "Hub"),
    ],
)
def test_bad_samples_are_one_sentence(tmp_path, digit_folder, capsys, make, wanted):
    (tmp_path / "samples").mkdir()
    flags = ["--dataset_name", digit_folder, "--metrics", "fd_mnist", "--output", tmp_path / "r.json"]
    with pytest.raises(SystemExit) as exit:
        evaluate(make(tmp_path / "samples"), *flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and wanted in error, error
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "array, wanted",
    [
        (np.full((20, 28, 28, 1), np.nan, dtype=np.float32), "float32"),
        (np.zeros((20, 28, 28), dtype=np.uint8), "shape"),
        (np.zeros((0, 28, 28, 1), dtype=np.uint8), "shape"),
    ],
)
def test_bad_arrays_are_one_sentence(tmp_path, digit_folder, capsys, array, wanted):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "a.npz", "--dataset_name", digit_folder, "--output", tmp_path / "r.json")
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK cut off", "npy"])
def test_what_is_no_npz_is_one_sentence(tmp_path, digit_folder, capsys, content):
    path = tmp_path / "a.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros((20, 28, 28, 1), np.uint8))
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        evaluate(path, "--dataset_name", digit_folder, "--output", tmp_path / "r.json")
    assert "cannot be read as .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("", "nothing to score"),
        ("{run} --bound_timesteps 1 --metrics bits_per_dim", "at least 2"),
        ("{run} --bound_images -5 --metrics bits_per_dim", "at least 1"),
        ("{run} --require beauty", "there is no metric 'beauty'"),
        ("{run} --reference nosuch.npz --metrics fd_mnist", "--reference is only for fid"),
        ("{run} --metrics beauty", "there is no metric 'beauty'"),
        ("{run} --dataset_name nowhere/none", "the Hub cannot be reached"),
        ("{run} --dataset_name nowhere/none", "give --dataset_name a Hub dataset"),
        (
            "{run} --dataset_name digits",
            "; --validation_split test comes from the model's train_config.json, and flags that you give override it.",
        ),
        ("{run} --num_images 0", "at least 1"),
        ("--calibrate {run}", "only real images"),
        ("--calibrate --dataset_name {data}/train", "--validation_split"),
        ("{run} --from_samples {other}", "another model"),
        ("{samples} --metrics bits_per_dim --dataset_name {data}", "give the model"),
        ("{samples}", "--dataset_name"),
        ("{samples} --from_samples {samples}", "both samples"),
        ("{samples} --dataset_name {data} --num_images 50", "there are only 40 samples"),
    ],
)
def test_bad_flags_are_one_sentence(tiny_run, digit_folder, record, tmp_path, capsys, flags, wanted):
    other = make_run(tmp_path / "other", digit_folder, seed=1)
    if "{other}" in flags:
        draw = f"sample {other} --num_images 2 --sampler ddim --num_inference_steps 2 --output {tmp_path / 'drawn'}"
        main(draw.split())
    places = dict(run=tiny_run, data=digit_folder, samples=record.parent / "samples", other=tmp_path / "drawn")
    with pytest.raises(SystemExit) as exit:
        evaluate(*flags.format(**places).split(), "--output", tmp_path / "r.json", "--samples_dir", tmp_path / "s")
    assert exit.value.code == 2 and wanted in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["sampler"].update(seed="x"),
        lambda record: record["sampler"].update(seed=[1]),
        lambda record: record.update(samples=[1]),
        lambda record: record["samples"].update(n="many"),
        lambda record: record["metrics"].append({"id": "fid", "status": "skipped", "floor": "x"}),
        lambda record: record["metrics"].append({"id": "fid", "status": "skipped", "value": 3}),
    ],
)
def test_a_record_whose_seed_or_number_is_none_is_refused(tmp_path, change, capsys):
    good = ROOT / "tests" / "fixtures" / "run_5c3000a" / "run" / "evaluations" / "finished.json"
    record = json.loads(good.read_text())
    change(record)
    (tmp_path / "odd.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(good), str(tmp_path / "odd.json")])
    assert exit.value.code == 2 and "odd.json is not a record of the schema" in capsys.readouterr().err
