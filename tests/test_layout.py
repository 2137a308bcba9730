"""The rules of the layout: imports point one way, --help needs no torch, and every flag is read somewhere."""

import ast
import dataclasses
import re
import shlex
import sys
from importlib import metadata

import pytest
from conftest import ROOT

from ddpm_hf.__main__ import parse
from ddpm_hf.config.training_config import TrainingConfig


# A room imports only from rooms to its left, and from the small files at the top, which come before them all.
ROOMS = ["top", "config", "data", "diffusion", "models", "sampling", "evaluation", "sharing", "training", "commands"]
PACKAGE = ROOT / "ddpm_hf"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
WITHOUT_TORCH = [PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "errors.py"]
WITHOUT_TORCH += [*(PACKAGE / "config").glob("*.py"), *(PACKAGE / "commands").glob("*.py")]
PARSERS = ["config/command_line.py", "evaluation/train_classifier.py"]


def room_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "top"


def imports_of_ours(path, tree=None):
    """Return the files of ours that a file imports, at its top level or inside functions."""
    found = set()
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
            names = [folder / alias.name for alias in node.names]
            found |= {name.with_suffix(".py") if name.with_suffix(".py").is_file() else folder for name in names}
    return {
        path if path.suffix else path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in found
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_to_its_left(path):
    for imported in imports_of_ours(path):
        assert imported.is_file() and ROOMS.index(room_of(imported)) <= ROOMS.index(room_of(path)), imported


def test_there_are_no_circles():
    left = {path: imports_of_ours(path) - {path} for path in MODULES}
    while left:
        free = [path for path, imported in left.items() if not imported & left.keys()]
        assert free, f"these import each other in a circle: {sorted(map(str, left))}"
        for path in free:
            del left[path]


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_flags_and_errors_need_no_torch(path):
    """At module level, directly or through what is imported there: `--help` answers at once."""
    seen, ahead = set(), [path]
    while ahead:
        module = ahead.pop()
        tree = ast.parse(module.read_text())
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
        names |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        heavy = {"torch", "diffusers", "datasets", "accelerate", "numpy", "PIL", "gradio"}
        assert not heavy & {name.split(".")[0] for name in names}, module
        seen.add(module)
        ahead += imports_of_ours(module, tree) - seen


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_command_lines_are_the_business_of_commands(path):
    """Other modules take values, not argparse's namespace, so that a notebook can call them."""
    if room_of(path) == "commands" or path.relative_to(PACKAGE).as_posix() in PARSERS:
        return
    tree = ast.parse(path.read_text())
    assert "arguments" not in [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    assert not re.search(r"^\s*(import|from) argparse", path.read_text(), re.MULTILINE)


SOURCES = [*MODULES, PACKAGE / "__main__.py", *PIPELINES, *sorted((ROOT / "spaces").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen_and_name_their_arguments(path):
    """More than 60 lines or five positional parameters have their reason in a comment right above the function."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
        names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        positional = len(names) - (names[:1] in (["self"], ["cls"]))
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        has_reason = lines[first - 2].lstrip().startswith("#")
        assert has_reason or (length <= 60 and positional <= 5), (
            f"{node.name}: {length} lines, {positional} parameters"
        )
    assert "# fmt: skip" not in text


@pytest.mark.parametrize("path", [*PIPELINES, PACKAGE / "models" / "classifier.py"], ids=lambda path: path.stem)
def test_what_travels_with_a_model_needs_nothing_of_ours(path):
    tree = ast.parse(path.read_text())
    found = {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    strangers = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    assert strangers <= {"torch", "numpy", "PIL", "diffusers"}
    bases = [base.id for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    assert bases.count("DiffusionPipeline") == (path.parent.name == "pipelines")  # diffusers looks for the only one


def test_functions_that_several_pipelines_have_are_the_same():
    """Each pipeline travels alone, so it has its own copy of what the pipelines share. Change all copies together."""
    sources = {}
    for path in PIPELINES:
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                sources.setdefault(node.name, []).append(ast.get_source_segment(text, node))
    copied = {name: copies for name, copies in sources.items() if len(copies) > 1}
    assert {"after_step", "check_generator", "to_output"} <= set(copied)
    assert [name for name, copies in copied.items() if len(set(copies)) > 1] == []


# All but the preset, which `TrainingConfig.from_preset` reads before there is a config.
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(TrainingConfig) if field.name != "preset"]
)
def test_every_flag_is_read(name):
    own = (PACKAGE / "config" / "training_config.py").read_text()
    sources = [path.read_text() for path in MODULES if path.stem != "training_config"]
    assert any(f"config.{name}" in text for text in sources) or f"self.{name}" in own


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/scores.md", "pipelines/README.md"])
def test_pages_are_whole(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", text)
    for link in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text):
        assert (folder / (link[0] or link[1])).exists(), link


@pytest.mark.parametrize("page", ["README.md", "docs/scores.md", "docs/results.md"])
def test_commands_of_the_package_are_parsed(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python -m |accelerate launch -m )?ddpm_hf ([^#\n]*)", text, re.MULTILINE)
    assert commands or page != "README.md"
    for command in commands:
        parse(shlex.split(command))


def test_every_pinned_package_is_installed():
    """Also a package that an installed one needs. `make setup` installs all extras but [benchmark]."""
    names = {re.sub(r"[-_.]+", "-", each.name).lower() for each in metadata.distributions()}
    pins = re.findall(r"^([^#=\n]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pins) > 50 and [pin for pin in pins if re.sub(r"[-_.]+", "-", pin).lower() not in names] == []


def test_nothing_pulls_torchvision():
    for name in ("setup.cfg", "constraints.txt"):
        text = (ROOT / name).read_text()
        assert not re.search(r"torchvision|torch-fidelity|timm|lpips", text)


FILES_OF_TEXT = sorted(path for part in (PACKAGE, ROOT / "spaces", ROOT / "pipelines") for path in part.rglob("*.py"))


def test_every_text_is_read_and_written_as_utf_8():
    """Without `encoding`, Python takes that of the system. In Latin-1, the emojis of a Space cannot be read."""
    found = []
    for path in FILES_OF_TEXT:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "open(" in text or "_text(" in text else ():
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
            mode = [word.value for word in node.keywords if word.arg == "mode"] + node.args[1:2]
            is_binary = any("b" in str(getattr(value, "value", "")) for value in mode)
            is_text = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
            if is_text or is_open and not is_binary:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
