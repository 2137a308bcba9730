"""The functions that several pipeline files share are equal. The files cannot import each other."""

import ast
import importlib.util
import math

import pytest
import torch
from conftest import ROOT


FILES = sorted((ROOT / "pipelines").glob("*.py"))
SHARED = {
    "to_tensor": 2,
    "to_output": 3,
    "ddpm_scheduler": 3,
    "trailing_timesteps": 2,
    "predict_original_sample": 2,
    "after_step": 3,
    "check_steps": 3,
    "check_generator": 3,
    "check_output": 3,
}


def load(path):
    """Import a pipeline file."""
    spec = importlib.util.spec_from_file_location(f"agree_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions():
    """Name -> the code of every function that stands at the top of a pipeline file under that name."""
    found = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(ast.unparse(node))
    return found


def test_what_is_shared_is_what_is_listed():
    assert {name: len(codes) for name, codes in functions().items() if len(codes) > 1} == SHARED


@pytest.mark.parametrize("name", SHARED)
def test_it_is_the_same_in_every_file(name):
    codes = functions()[name]
    assert codes == codes[:1] * len(codes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_method_has_more_than_five_positional_parameters(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = [one.arg for one in node.args.posonlyargs + node.args.args if one.arg != "self"]
            assert len(names) <= 5, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tensor_stays_on_its_device(path):
    images = load(path).to_output(torch.zeros(2, 3, 4, 5, device="meta"), "pt")
    assert images.device.type == "meta" and images.shape == (2, 3, 4, 5)


@pytest.mark.parametrize("pixel", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_pixels_that_are_not_finite_become_no_picture(path, pixel):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 2] = pixel
    with pytest.raises(ValueError, match="pixels that are nan or infinite"):
        load(path).to_output(images, "pil")
