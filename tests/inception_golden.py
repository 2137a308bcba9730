"""Make inception_golden.json: the outputs of the reference implementations for seeded weights and images.

    python -m tests.inception_golden PYTORCH_FID TORCH_FIDELITY TORCHVISION

PYTORCH_FID and TORCH_FIDELITY are checkouts of mseitzer/pytorch-fid (b9c1811 was taken) and toshas/torch-fidelity
(5e211a9); TORCHVISION is a folder with torchvision/models/inception.py (of 0.29.2). Nothing of theirs is installed:
their files are imported with stubs for what they do not need. tf1 is the answer of torch-fidelity, antialias that of
torchmetrics (1.9.0) on torch-fidelity's network, pytorch that of pytorch-fid on torchvision's. Each is also compared
with ours, in full, as is torchmetrics with antialias=False.
"""

import importlib
import json
import math
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch

from ddpm_hf.evaluation.inception import InceptionV3, load_inception
from ddpm_hf.randomness import keyed_generator


GOLDEN = Path(__file__).with_suffix(".json")
SIZES = [(32, 32), (320, 304)]  # one that is enlarged, one that is reduced
EVERY = {"features": 205, "logits": 101}  # of the 2048 and 1008: ten numbers each


def seeded_weights() -> dict[str, torch.Tensor]:
    """Every weight and statistic of the network at random, on a scale that keeps the signal alive through it."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    weights = {}
    for name in sorted(shapes):
        shape, generator = shapes[name], keyed_generator(0, "inception", name)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / shape[1:].numel())
        elif name.endswith(("bn.weight", "running_var")):
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
    return weights


def seeded_image(height: int, width: int) -> torch.Tensor:
    """One uint8 image (1, 3, height, width) of independent pixels."""
    generator = keyed_generator(0, "image", height, width)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


def thinned(features: torch.Tensor, logits: torch.Tensor) -> dict[str, list[float]]:
    """Ten features and ten logits of one image, spread evenly."""
    outputs = {"features": features, "logits": logits}
    return {name: output[0, :: EVERY[name]].tolist() for name, output in outputs.items()}


def _stub(name: str, path: str | None = None, **content):
    """Register a module `name` with this content, whose submodules are looked for in the folder `path`."""
    module = module_from_spec(ModuleSpec(name, None, is_package=True))
    module.__path__ = [] if path is None else [path]
    vars(module).update(content)
    sys.modules[name] = module


def _import_theirs(pytorch_fid: str, torch_fidelity: str, torchvision: str):
    """Return the modules of pytorch-fid's and torchmetrics' networks, on torch-fidelity's and torchvision's."""
    _stub("torch_fidelity", f"{torch_fidelity}/torch_fidelity")
    torchmetrics_fid = importlib.import_module("torchmetrics.image.fid")  # before there seems to be a torchvision
    _stub("torchvision", f"{torchvision}/torchvision", __version__="0.29.2")
    _stub("torchvision.models", f"{torchvision}/torchvision/models")
    _stub("torchvision.utils", _log_api_usage_once=lambda _: None)
    _stub("torchvision.transforms._presets", ImageClassification=MagicMock())
    _stub("torchvision.models._api", register_model=MagicMock(), Weights=MagicMock(), WeightsEnum=object)
    _stub("torchvision.models._meta", _IMAGENET_CATEGORIES=[])
    _stub("torchvision.models._utils", _ovewrite_named_param=None, handle_legacy_interface=MagicMock())
    networks = importlib.import_module("torchvision.models.inception")
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    sys.modules["torchvision.models"].inception = networks
    sys.modules["torchvision.models"].inception_v3 = lambda weights, **kwargs: networks.Inception3(**kwargs)
    sys.path.insert(0, f"{pytorch_fid}/src/pytorch_fid")
    return importlib.import_module("inception"), torchmetrics_fid


@torch.no_grad()
def main(pytorch_fid: str, torch_fidelity: str, torchvision: str) -> None:
    weights = seeded_weights()
    path = Path(tempfile.mkdtemp()) / "weights.pth"
    torch.save(weights, path)
    fid, torchmetrics_fid = _import_theirs(pytorch_fid, torch_fidelity, torchvision)
    outputs = ["2048", "logits_unbiased"]
    fidelity = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    tf1 = fidelity.FeatureExtractorInceptionV3("tf1", outputs, str(path))
    antialias = torchmetrics_fid.NoTrainInceptionV3("antialias", outputs, str(path), antialias=True)
    legacy = torchmetrics_fid.NoTrainInceptionV3("legacy", outputs, str(path), antialias=False)
    fid.load_state_dict_from_url = lambda *_, **__: weights  # load_state_dict is strict: the names are right
    pytorch = fid.InceptionV3().eval()

    def fid_answer(images):
        features = pytorch(images.float() / 255)[0].flatten(1)
        return features, features @ weights["fc.weight"].T

    golden = {}
    for pipeline, answer in [
        ("tf1", tf1),
        ("tf1", legacy._torch_fidelity_forward),
        ("antialias", antialias._torch_fidelity_forward),
        ("pytorch", fid_answer),
    ]:
        extractor = load_inception(path, pipeline)
        for size in SIZES:
            theirs, ours = answer(seeded_image(*size)), extractor(seeded_image(*size))
            for name, their, our in zip(EVERY, theirs, ours):
                difference = (our - their).abs().max().item()
                relative = difference / their.abs().max().item()
                print(
                    f"{pipeline:9} {size} {name:8} largest difference {difference:.1e}, of the largest {relative:.1e}"
                )
            golden.setdefault(pipeline, {}).setdefault("x".join(map(str, size)), thinned(*theirs))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
