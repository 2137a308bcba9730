"""The InceptionV3 of the Fréchet Inception Distance: the graph that TensorFlow published on 2015-12-05.

It differs from torchvision's InceptionV3 in three points. Average pooling ignores the padding, the pool branch of the
last block takes the maximum, and there are 1008 logits. The weights have the same names as in pytorch-fid and
torch-fidelity, so files of weights can be shared with both.
"""

import hashlib
import http.client
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError, reason_of, suggestion
from ..hub_requests import SILENT_SECONDS, in_thread, transfer_seconds
from .features import Extractor, check_images, full_precision


# How images are resized and scaled for the network. Each pipeline gives different distances. These programs use them:
# tf1: TTUR, EDM, StyleGAN, torch-fidelity, torchmetrics with antialias=False. antialias: torchmetrics since 1.8.
# pytorch: pytorch-fid.
PIPELINES = ("tf1", "antialias", "pytorch")
IMAGE_SIZE = 299
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SIZE = 95_600_000  # bytes of the file at URL, about
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the file at URL
# A convolution is (channels, kernel height, kernel width). A stride other than 1 is a fourth number. A branch is a
# list of convolutions that run one after another. Convolutions in an inner list all have the same input, and their
# outputs are concatenated.
STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 2),
    "Conv2d_2a_3x3": (32, 3, 3),
    "Conv2d_2b_3x3": (64, 3, 3),
    "Conv2d_3b_1x1": (80, 1, 1),
    "Conv2d_4a_3x3": (192, 3, 3),
}
PADDED_IN_STEM = ("Conv2d_2b_3x3",)
POOLED_IN_STEM = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


def _block_35x35(pool_channels: int) -> dict:
    return {
        "branch1x1": [(64, 1, 1)],
        "branch5x5": [(48, 1, 1), (64, 5, 5)],
        "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        "branch_pool": [(pool_channels, 1, 1)],
    }


def _block_17x17(width: int) -> dict:
    return {
        "branch1x1": [(192, 1, 1)],
        "branch7x7": [(width, 1, 1), (width, 1, 7), (192, 7, 1)],
        "branch7x7dbl": [(width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)],
        "branch_pool": [(192, 1, 1)],
    }


BLOCK_TO_17x17 = {
    "branch3x3": [(384, 3, 3, 2)],
    "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)],
    "branch_pool": [],
}
BLOCK_TO_8x8 = {
    "branch3x3": [(192, 1, 1), (320, 3, 3, 2)],
    "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)],
    "branch_pool": [],
}
BLOCK_8x8 = {
    "branch1x1": [(320, 1, 1)],
    "branch3x3": [(384, 1, 1), [(384, 1, 3), (384, 3, 1)]],
    "branch3x3dbl": [(448, 1, 1), (384, 3, 3), [(384, 1, 3), (384, 3, 1)]],
    "branch_pool": [(192, 1, 1)],
}
BLOCKS = {
    "Mixed_5b": _block_35x35(32),
    "Mixed_5c": _block_35x35(64),
    "Mixed_5d": _block_35x35(64),
    "Mixed_6a": BLOCK_TO_17x17,
    "Mixed_6b": _block_17x17(128),
    "Mixed_6c": _block_17x17(160),
    "Mixed_6d": _block_17x17(160),
    "Mixed_6e": _block_17x17(192),
    "Mixed_7a": BLOCK_TO_8x8,
    "Mixed_7b": BLOCK_8x8,
    "Mixed_7c": BLOCK_8x8,
}


class MissingWeights(UserError):
    """The weights are not on this machine and cannot be downloaded, so the metric is skipped."""


class InceptionV3(nn.Module):
    """The network of Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567) in the variant that FID uses.

    The weights are random until weights are loaded.
    """

    def __init__(self):
        super().__init__()
        channels = 3
        for name, convolution in STEM.items():
            self.add_module(name, _convolution(channels, *convolution, padded=name in PADDED_IN_STEM))
            channels = convolution[0]
        for name, branches in BLOCKS.items():
            block = _Block(channels, branches, average=name != "Mixed_7c")
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 2048) after the last pooling, and the logits (B, 1008).

        The bias is not added to the logits, because the code of Salimans et al. 2016 does not add it either when it
        computes the Inception Score.

        Args:
            x: float32 (B, 3, 299, 299) in [-1, 1], the result of `preprocess`.
        """
        for name in STEM:
            x = self.get_submodule(name)(x)
            if name in POOLED_IN_STEM:
                x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


class _Block(nn.Module):
    """Branches with the same input. Their outputs are concatenated. The last branch begins with a 3x3 pooling.

    If the last branch has no convolutions, its pooling halves the resolution.
    """

    def __init__(self, in_channels: int, branches: dict, average: bool):
        super().__init__()
        self.branches = branches
        self.average = average
        self.channels = 0
        for branch, stages in branches.items():
            channels = in_channels
            for names, convolutions in _named(branch, stages):
                for name, convolution in zip(names, convolutions):
                    self.add_module(name, _convolution(channels, *convolution))
                channels = sum(convolution[0] for convolution in convolutions)
            self.channels += channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, stages in self.branches.items():
            y = self._pool(x, halve=not stages) if branch == "branch_pool" else x
            for names, _ in _named(branch, stages):
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _pool(self, x: Tensor, halve: bool) -> Tensor:
        if halve:
            return F.max_pool2d(x, 3, stride=2)
        if self.average:
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=1, padding=1)


def _named(branch: str, stages: list) -> Iterator[tuple[list[str], list[tuple]]]:
    """Yield the names and the convolutions of each stage of a branch.

    A stage is one convolution, or two with the same input. The names are e.g. [branch_1] for the first stage, and
    [branch_2a, branch_2b] for a second stage of two convolutions. If there is only one stage, its name is [branch].
    """
    for number, stage in enumerate(stages, 1):
        name = branch if len(stages) == 1 else f"{branch}_{number}"
        yield ([f"{name}a", f"{name}b"], stage) if isinstance(stage, list) else ([name], [stage])


def _convolution(in_channels: int, channels: int, height: int, width: int, stride: int = 1, *, padded: bool = True):
    """Return a convolution, a batch norm and a ReLU. If `padded` and the stride is 1, the resolution is kept."""
    padding = (height // 2, width // 2) if padded and stride == 1 else 0
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(in_channels, channels, (height, width), stride, padding, bias=False))
    block.add_module("bn", nn.BatchNorm2d(channels, eps=0.001))
    block.add_module("relu", nn.ReLU(inplace=True))
    return block


class InceptionExtractor(Extractor):
    """An extractor of features and logits from uint8 images, always in eval mode and in true float32.

    Attributes:
        pipeline: how images are resized and scaled, one of PIPELINES.
        sha256: the hash of the file of weights.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, network: InceptionV3, pipeline: str, sha256: str):
        super().__init__()
        self.network = network
        self.pipeline = pipeline
        self.sha256 = sha256
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 2048) and logits (B, 1008), float32, for uint8 images (B, 1 or 3, H, W).

        Raises:
            UserError: for images of another type or shape.
        """
        with full_precision(images.device):
            return self.network(preprocess(images, self.pipeline))


def load_inception(weights: str | Path | None = None, pipeline: str = "tf1") -> InceptionExtractor:
    """Return the extractor that FID uses, on the CPU.

    Args:
        weights: a .pth or .safetensors file with the weights of pytorch-fid or torch-fidelity. None: the file that
            pytorch-fid released. It is read from torch's hub cache, and downloaded if it is not there yet.
        pipeline: one of PIPELINES.

    Raises:
        MissingWeights: if no file is given, and the released file is not in the cache and cannot be downloaded.
        UserError: for an unknown pipeline, or a file that does not hold these weights.
    """
    _check_pipeline(pipeline)
    path = _download() if weights is None else Path(weights)
    with torch.device("meta"):  # the weights are replaced, so initialising them would waste time
        network = InceptionV3()
    # A damaged or foreign file can fail in the unpickler, in safetensors or in PyTorch, with nearly any exception.
    try:
        # Load from a plain dict: without version numbers of layers, PyTorch accepts missing num_batches_tracked.
        is_safe = path.suffix == ".safetensors"
        read = safetensors.torch.load_file if is_safe else partial(torch.load, map_location="cpu", weights_only=True)
        network.load_state_dict(dict(read(path)), assign=True)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:
        raise UserError(
            f"{path} does not hold the weights of FID's Inception ({type(error).__name__}: {reason_of(error)}): give "
            f"--inception the file from {URL}."
        ) from error
    return InceptionExtractor(network.float(), pipeline, sha256)


def _download() -> Path:
    """Return the path of the weights in torch's hub cache, which pytorch-fid uses too. Download them if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        seconds = transfer_seconds(SIZE)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Limit the time with a thread, because no timeout of urllib limits how slowly a server sends its headers.
            in_thread(lambda: _fetch(path, time.monotonic() + seconds)).result(seconds)
            return path
        except (OSError, http.client.HTTPException) as error:  # a TimeoutError without a message means our own limit
            reason = reason_of(error) if str(error) else f"the download was not complete after {seconds:.0f} s"
    raise MissingWeights(
        f"the Inception weights {path.name} are not in torch's hub cache and cannot be downloaded from {URL} "
        f"({reason}): download this file on a machine with a network, and give --inception FILE."
    )


def _fetch(path: Path, end: float):
    """Download the weights to `path`, completely or not at all.

    We do not use `torch.hub.download_url_to_file`, because it waits for ever for a server that is silent.

    Args:
        end: the time at which to give up, on the clock time.monotonic().

    Raises:
        TimeoutError: without a message, if the download is not complete at `end`.
        OSError: if the server does not answer or sends another file, or if `path` cannot be written.
        HTTPException: if the answer is broken.
    """
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(URL, timeout=SILENT_SECONDS) as answer,
        tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary,
        tqdm(desc="Inception", total=SIZE, unit="B", unit_scale=True, disable=None) as bar,
    ):
        partial = Path(temporary, path.name)
        with partial.open("wb") as file:
            while part := answer.read1(2**16):
                file.write(part)
                digest.update(part)
                bar.update(len(part))
                if time.monotonic() > end:
                    raise TimeoutError
        if digest.hexdigest() != SHA256:
            raise OSError(f"the file there has the SHA-256 {digest.hexdigest()[:8]}... instead of {SHA256[:8]}...")
        partial.replace(path)


def preprocess(images: Tensor, pipeline: str) -> Tensor:
    """Return uint8 images (B, 1 or 3, H, W) as the network's input: float32 (B, 3, 299, 299) in [-1, 1].

    Raises:
        UserError: for images of another type or shape, or an unknown pipeline.
    """
    _check_pipeline(pipeline)
    check_images("Inception", images)
    x = images.float()
    if pipeline == "tf1":
        x = _tf1_matrix(x.shape[2], x.device) @ x @ _tf1_matrix(x.shape[3], x.device).T
    else:
        x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=pipeline == "antialias")
    x = 2 * x / 255 - 1 if pipeline == "pytorch" else (x - 128) / 128
    return x.expand(-1, 3, -1, -1)


def _tf1_matrix(size: int, device: torch.device) -> Tensor:
    """Return the (299, size) matrix of TensorFlow 1's bilinear interpolation along one axis, float32.

    Output i is read at position i * size / 299. (Later versions of TensorFlow add half-pixel offsets.) The last pixel
    is repeated beyond the edge.
    """
    position = torch.arange(IMAGE_SIZE, dtype=torch.float32, device=device) * (size / IMAGE_SIZE)
    low = position.long()
    high = (low + 1).clamp(max=size - 1)
    upper = (position - low).unsqueeze(1)
    pixels = torch.eye(size, device=device)
    return pixels[low] * (1 - upper) + pixels[high] * upper


def _check_pipeline(pipeline: str) -> None:
    if pipeline not in PIPELINES:
        raise UserError(f"--inception_pipeline is {pipeline!r}: {suggestion(pipeline, PIPELINES)}")
