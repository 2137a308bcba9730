"""FID's Inception against the outputs of the reference implementations; see inception_golden.py."""

import hashlib
import itertools
import json
import time

import pytest
import safetensors.torch
import torch
from inception_golden import GOLDEN, SIZES, seeded_image, seeded_weights, thinned
from odd_server import OddServer

from ddpm_hf import UserError
from ddpm_hf.evaluation.inception import PIPELINES, InceptionV3, MissingWeights, load_inception, preprocess


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file that a user has, with random content."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(seeded_weights(), path)
    yield path
    path.unlink()  # 96 MB, and pytest keeps the folders of three sessions


@pytest.fixture(scope="module")
def tf1(weights):
    return load_inception(weights)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_features_and_logits_are_those_of_the_reference_implementations(weights, pipeline):
    golden = json.loads(GOLDEN.read_text())[pipeline]
    extractor = load_inception(weights, pipeline)
    for height, width in SIZES:
        features, logits = extractor(seeded_image(height, width))
        assert features.shape == (1, 2048) and logits.shape == (1, 1008)
        assert features.dtype == logits.dtype == torch.float32 and not features.requires_grad
        for name, ours in thinned(features, logits).items():
            theirs = torch.tensor(golden[f"{height}x{width}"][name])
            assert (torch.tensor(ours) - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("size", ["32x32", "320x304"])
def test_the_golden_numbers_tell_the_pipelines_apart(size):
    golden = json.loads(GOLDEN.read_text())
    for one, other in itertools.combinations(PIPELINES, 2):
        a, b = (torch.tensor(golden[pipeline][size]["features"]) for pipeline in (one, other))
        assert (a - b).abs().max() > 1e-3 * a.abs().max()  # ten times what the test above allows


def test_the_state_dict_is_that_of_the_published_file():
    with torch.device("meta"):
        network = InceptionV3()
    state = network.state_dict()
    # 94 convolutions of 6 tensors each (weight, and 5 of the batch norm), and fc's weight and bias.
    assert len(state) == 94 * 6 + 2 == 566
    assert sum(name.endswith("num_batches_tracked") for name in state) == 94
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch1x1.bn.running_mean": (64,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def resized_by_hand(row):
    """TensorFlow 1's row of 2 pixels as 4, at 0, 0.5, 1 and 1.5, the last pixel repeated."""
    a, b = row
    return torch.tensor([a, (a + b) / 2, b, b])


def test_tf1_resizes_as_by_hand(monkeypatch):
    monkeypatch.setattr("ddpm_hf.evaluation.inception.IMAGE_SIZE", 4)
    image = torch.tensor([[[[0, 128], [64, 255]]]], dtype=torch.uint8)
    rows = torch.stack([resized_by_hand([0.0, 128.0]), resized_by_hand([64.0, 255.0])])
    wanted = torch.stack([resized_by_hand(column) for column in rows.T], dim=1)
    assert wanted[1].tolist() == [32, 111.75, 191.5, 191.5]
    assert torch.equal(preprocess(image, "tf1")[0, 0], (wanted - 128) / 128)


@pytest.mark.parametrize(
    "pipeline, black, white", [("tf1", -1, 127 / 128), ("antialias", -1, 127 / 128), ("pytorch", -1, 1)]
)
def test_the_range_of_the_input(pipeline, black, white):
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    inputs = preprocess(images, pipeline)
    assert inputs.shape == (2, 3, 299, 299) and inputs.dtype == torch.float32
    assert torch.allclose(inputs[0], torch.tensor(float(black))) and torch.allclose(
        inputs[1], torch.tensor(float(white))
    )


def test_an_image_of_the_networks_size_is_only_scaled():
    image = seeded_image(299, 299)
    for pipeline in ("tf1", "antialias"):
        assert torch.allclose(preprocess(image, pipeline), (image.float() - 128) / 128, atol=1e-6)


def test_what_a_record_needs_and_eval_mode_for_good(weights, tf1):
    assert (tf1.name, tf1.pipeline, tf1.num_features) == ("inception", "tf1", 2048)
    assert tf1.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    torch.nn.Sequential(tf1).train()
    assert not any(module.training for module in tf1.modules())


def test_autocast_and_tf32_have_no_say_and_come_back(tf1, monkeypatch):
    image = seeded_image(32, 32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    tf1.network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = tf1(image)
    assert torch.equal(features, tf1(image)[0])
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_safetensors_without_the_counters_of_batches_load_too(tf1, tmp_path):
    state = {name: tensor for name, tensor in seeded_weights().items() if not name.endswith("num_batches_tracked")}
    assert len(state) == 472
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    loaded = load_inception(path).state_dict()
    path.unlink()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tf1.state_dict().items())


def test_refusals(tmp_path, tf1):
    with pytest.raises(UserError, match="pipeline is 'tf2': did you mean tf1"):
        load_inception(tmp_path / "none.pth", "tf2")
    with pytest.raises(UserError, match=r"float32 images of shape \(1, 3, 8, 8\): round the pixels"):
        tf1(torch.rand(1, 3, 8, 8))
    with pytest.raises(UserError, match="uint8 images of shape"):
        preprocess(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), "tf1")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pth")  # weights_only refuses it
    for name in ["absent.pth", "empty.pth", "text.safetensors", "other.pth", "list.pth", "pickled.pth"]:
        with pytest.raises(UserError, match=f"{name} does not hold the weights of FID's Inception") as caught:
            load_inception(tmp_path / name)
        assert not isinstance(caught.value, MissingWeights) and "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123"])
def test_a_silent_or_dripping_server_is_a_sentence_in_bounded_time(answer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ddpm_hf.evaluation.inception.URL", OddServer(answer, 0.05).url + "/pt_inception.pth")
    monkeypatch.setattr("ddpm_hf.evaluation.inception.transfer_seconds", lambda size: 0.7)
    started = time.perf_counter()
    with pytest.raises(MissingWeights, match="the download was not complete after 1 s"):
        load_inception()
    assert time.perf_counter() - started < 5


def test_without_a_network_the_weights_are_missing_unless_cached(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"pt_inception-2015-12-05-6726825d.pth .* --inception FILE"):
        load_inception()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ddpm_hf.evaluation.inception.URL", (tmp_path / "nowhere" / "pt_inception.pth").as_uri())
    with pytest.raises(MissingWeights, match="No such file"):
        load_inception()
    # What answers under the address but has other content, such as the page of a proxy, is not kept.
    monkeypatch.setattr("ddpm_hf.evaluation.inception.URL", weights.as_uri())
    with pytest.raises(MissingWeights, match="has the SHA-256"):
        load_inception()
    monkeypatch.setattr("ddpm_hf.evaluation.inception.SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    assert load_inception().sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (tmp_path / "hub" / "checkpoints" / "weights.pth").is_file()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_inception()
    (tmp_path / "hub" / "checkpoints" / "weights.pth").unlink()
