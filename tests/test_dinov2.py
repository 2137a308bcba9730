"""FD-DINOv2's extractor on a tiny random DINOv2, against Pillow, transformers and interpolation done by hand."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ddpm_hf import UserError
from ddpm_hf.evaluation.dinov2 import hub_position_embeddings, load_dinov2, preprocess
from ddpm_hf.evaluation.inception import MissingWeights


def tiny_dinov2(folder, image_size, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(image_size=image_size, patch_size=14, **sizes)).eval()
    for parameter in model.parameters():  # DINOv2 is initialised so small that nothing would show
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A model whose grid is 16x16, and its folder."""
    folder = tmp_path_factory.mktemp("native")
    return tiny_dinov2(folder, 224), folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model with the grid of the published ones, 37x37."""
    folder = tmp_path_factory.mktemp("published")
    return tiny_dinov2(folder, 518), folder


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def by_hand(model, images):
    """Pillow, numpy and transformers in float64, up to the model."""
    pixels = []
    for image in images.permute(0, 2, 3, 1).numpy():
        resized = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), np.float64)
        pixels.append(((resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1))
    with torch.no_grad():
        return model(torch.from_numpy(np.stack(pixels)).float()).last_hidden_state[:, 0]


def test_features_are_those_of_pillow_and_transformers_when_the_grid_fits(native, images):
    model, folder = native
    extractor = load_dinov2(str(folder))
    features, logits = extractor(images)
    assert logits is None and features.dtype == torch.float32 and features.shape == (2, 16)
    assert torch.allclose(features, by_hand(model, images), atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01
    assert (extractor.name, extractor.num_features) == ("dinov2", 16)


def test_position_embeddings_are_interpolated_as_asked(published, images):
    model, folder = published
    hub = load_dinov2(str(folder))
    assert hub.pipeline == "pil-bicubic-224"

    # The oracle: torch's own bicubic interpolation given the scale factor, as in DINOv2's code.
    table = model.embeddings.position_embeddings.detach()
    field = table[:, 1:].reshape(1, 37, 37, 16).permute(0, 3, 1, 2)
    factor = (16 + 0.1) / 37
    wanted = torch.nn.functional.interpolate(field, scale_factor=(factor, factor), mode="bicubic")
    baked = hub.model.embeddings.position_embeddings
    assert baked.shape == (1, 257, 16) and torch.equal(baked[:, 0], table[:, 0])
    assert torch.equal(baked[0, 1:].T.reshape(16, 16, 16), wanted[0])
    # transformers takes the baked table as it is, and its own differs.
    twin = Dinov2Model(Dinov2Config.from_pretrained(folder, image_size=224)).eval()
    twin.load_state_dict(model.state_dict() | {"embeddings.position_embeddings": baked})
    assert torch.allclose(hub(images)[0], by_hand(twin, images), atol=1e-5)
    assert (hub(images)[0] - by_hand(model, images)).abs().max() > 1e-4


def test_the_hub_reads_the_grid_where_its_scale_says():
    def cubic(x):  # Keys 1981, with torch's a = -3/4
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    columns = torch.arange(37.0).square()
    table = torch.cat([torch.full((1, 1, 1), -5.0), columns.repeat(37, 1).reshape(1, 37 * 37, 1)], dim=1)
    row = hub_position_embeddings(table, 16)[0, 1:17, 0]
    for k in range(1, 15):  # not the ends, where the grid is continued
        place = (k + 0.5) * 37 / 16.1 - 0.5
        wanted = sum(cubic(place - j) * float(columns[j]) for j in range(37))
        assert math.isclose(row[k], wanted, rel_tol=1e-4)


def test_grey_is_repeated_and_the_image_is_neither_cropped_nor_rounded_twice():
    grey = torch.randint(0, 256, (1, 1, 20, 30), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(preprocess(grey), preprocess(grey.repeat(1, 3, 1, 1)))
    flat = preprocess(torch.full((1, 1, 20, 30), 255, dtype=torch.uint8))
    assert flat.shape == (1, 3, 224, 224)
    assert torch.allclose(flat[0, :, 100, 100], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    marked = torch.zeros(1, 1, 20, 40, dtype=torch.uint8)
    marked[..., :2] = 255  # a centre crop would lose the left edge
    assert preprocess(marked)[0, 0, 112, 0] > 2


def test_it_stays_in_eval_mode_and_in_float32(native, images):
    extractor = load_dinov2(str(native[1]))
    wanted = extractor(images)[0]
    metric = torch.nn.Sequential(extractor).train()
    assert not any(module.training for module in metric[0].modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images)[0], wanted)
    assert not wanted.requires_grad


def test_the_hash_is_of_the_files(native, tmp_path):
    contents = [(native[1] / name).read_bytes() for name in ("config.json", "model.safetensors")]
    assert load_dinov2(str(native[1])).sha256 == hashlib.sha256(b"".join(contents)).hexdigest()
    tiny_dinov2(tmp_path, 224, seed=1)
    assert load_dinov2(str(tmp_path)).sha256 != load_dinov2(str(native[1])).sha256


@pytest.mark.parametrize("source", ["facebook/dinov2-large", "no/such/folder"])
def test_weights_that_cannot_be_had_are_missing(source):
    with pytest.raises(MissingWeights, match=f"^{source} .* --dinov2 FOLDER_OR_ID") as error:
        load_dinov2(source)
    assert "\n" not in str(error.value)


def test_what_is_no_dinov2_is_refused(native, tmp_path, images):
    def copy(name):
        return shutil.copytree(native[1], tmp_path / name)

    (tmp_path / "empty").mkdir()
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "vit")
    (copy("weightless") / "model.safetensors").unlink()
    (copy("broken") / "model.safetensors").write_bytes(b"x" * 100)
    deeper = copy("deeper") / "config.json"
    deeper.write_text(json.dumps(json.loads(deeper.read_text()) | {"num_hidden_layers": 3}))
    wider = copy("wider") / "config.json"
    wider.write_text(json.dumps(json.loads(wider.read_text()) | {"hidden_size": 32}))
    for name in ["empty", "vit", "weightless", "broken", "deeper", "wider"]:
        with pytest.raises(UserError, match=f"{name} .*: give a folder or Hub id with config.json") as error:
            load_dinov2(str(tmp_path / name))
        assert not isinstance(error.value, MissingWeights) and "\n" not in str(error.value)
    for wrong in [images.float(), images[:, :2], images[0]]:
        with pytest.raises(UserError, match="DINOv2 was given .* give uint8"):
            preprocess(wrong)
