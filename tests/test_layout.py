"""The house rules that a test can keep: imports point one way, files stay short, every flag is read somewhere."""

import ast
import dataclasses
import re
import shlex
import sys

import pytest
from conftest import ROOT

from ddpm_hf.__main__ import parse
from ddpm_hf.command_line import parse_config
from ddpm_hf.config import TrainingConfig


# Each module imports only from layers before its own.
LAYERS = [
    ["__init__"],
    ["presets", "randomness", "scheduler", "pixels", "options", "classifier"],
    ["likelihood", "metrics"],
    ["timestep_sampling"],
    ["config", "data", "losses", "sampling", "model"],
    ["command_line"],
    ["checkpoints", "guidance"],
    ["figures", "record", "saving", "digit_classifier"],
    ["hub", "pretrained", "samples", "inception", "memorization"],
    ["drawing", "dinov2", "records"],
    ["features", "card"],
    ["export", "publish"],
    ["reference"],
    ["feature_scores"],
    ["scores"],
    ["run_scores"],
    ["run"],
    ["milestones"],
    ["training", "evaluation", "restore"],
    ["__main__"],
]
MODULES = sorted((ROOT / "ddpm_hf").glob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))


def imports_of_ours(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ddpm_hf")):
            module = (node.module or "").removeprefix("ddpm_hf").removeprefix(".")
            names = [module] if module else [alias.name for alias in node.names]
            found |= {name if (ROOT / "ddpm_hf" / f"{name}.py").exists() else "__init__" for name in names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    layer = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert path.stem in layer, "a new module needs a place in LAYERS"
    for imported in imports_of_ours(path):
        assert layer[imported] < layer[path.stem], f"{path.stem} imports {imported}"


@pytest.mark.parametrize("path", [*MODULES, ROOT / "train_unconditional.py"], ids=lambda path: path.stem)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", [*PIPELINES, ROOT / "ddpm_hf" / "classifier.py"], ids=lambda path: path.stem)
def test_what_travels_with_a_model_needs_nothing_of_ours(path):
    tree = ast.parse(path.read_text())
    found = {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    strangers = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    assert strangers <= {"torch", "numpy", "PIL", "diffusers"}
    bases = [base.id for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    assert bases.count("DiffusionPipeline") == (path.parent.name == "pipelines")  # diffusers looks for the only one


def test_config_and_presets_import_no_torch():
    for name in ("__init__", "config", "command_line", "options", "presets"):
        assert not re.search(
            r"^\s*(import|from) (torch|diffusers|datasets)", (ROOT / f"ddpm_hf/{name}.py").read_text(), re.M
        )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingConfig)])
def test_every_flag_is_read(name):
    sources = [path.read_text() for path in MODULES if path.stem != "config"]
    own = (ROOT / "ddpm_hf" / "config.py").read_text()
    assert any(f"config.{name}" in text for text in sources) or f"self.{name}" in own


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/scores.md", "pipelines/README.md"])
def test_pages_are_whole(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", text)
    for link in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text):
        assert (folder / (link[0] or link[1])).exists(), link


def test_commands_in_the_readme_are_parsed():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [line.split("#")[0] for line in text.splitlines() if "launch train_unconditional.py" in line]
    assert len(commands) > 4
    for command in commands:
        parse_config(command.split("train_unconditional.py")[1].split())


@pytest.mark.parametrize("page", ["README.md", "docs/scores.md", "docs/results.md"])
def test_commands_of_the_package_are_parsed(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("python -m ddpm_hf ")]
    assert commands or page != "README.md"
    for command in commands:
        parse(shlex.split(command)[3:])


def test_nothing_pulls_torchvision():
    for name in ("setup.cfg", "constraints.txt"):
        text = (ROOT / name).read_text()
        assert not re.search(r"torchvision|torch-fidelity|timm|lpips", text)
