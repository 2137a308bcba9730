"""The model in examples/mnist: it draws the digits that are asked for, and its folder is small and whole."""

import json

import numpy as np
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline

import ddpm_hf
from ddpm_hf.evaluation.extractor import load_extractor


MNIST = ROOT / "examples" / "mnist"


def test_stock_diffusers_draws_the_digits_that_are_asked_for():
    pipeline = DiffusionPipeline.from_pretrained(MNIST, custom_pipeline="class_guided", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(k) for k in range(20)]
    digits = [*range(10)] * 2
    arguments = dict(guidance_scale=2.0, num_inference_steps=10, generator=generators)
    images = np.stack([np.asarray(image) for image in pipeline(class_labels=digits, **arguments).images])
    _, logits = load_extractor("digits")(torch.from_numpy(images)[:, None])
    assert (logits.argmax(dim=1) == torch.tensor(digits)).sum() >= 18
    # The package draws the same images.
    ours = ddpm_hf.sample(MNIST, 20, "ddim", num_inference_steps=10, class_labels=digits[:10], guidance_scale=2.0)
    assert np.abs(np.stack([np.asarray(image) for image in ours]).astype(int) - images).max() <= 1


def test_its_folder_has_its_record_its_scores_and_at_most_4_mb():
    files = [path for path in MNIST.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert json.loads((MNIST / "train_config.json").read_text())["flags"]["dataset_name"] == "ylecun/mnist"
    # The folder of a model has its own copy of the pipeline, so that it can be loaded from there.
    assert (MNIST / "class_guided.py").read_text() == (ROOT / "pipelines" / "class_guided.py").read_text()
    card = (MNIST / "README.md").read_text()
    metrics = [json.loads(path.read_text())["metrics"] for path in MNIST.glob("evaluations/*.json")]
    assert any(metrics) and "Not scored yet" not in card
