"""The public names: importable without torch, documented, their examples run, and their page made from them."""

import doctest
import importlib.util
import inspect
import re
import shutil

import pytest
from conftest import ROOT, TINY
from diffusers import DDPMPipeline

import ddpm_hf
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS


SPEC = importlib.util.spec_from_file_location("make_python_api", ROOT / "docs" / "make_python_api.py")
api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(api)
DESCRIBED = [name for names in api.TITLES.values() for name in names]
DOCUMENTED = [name for name in DESCRIBED if name not in api.TABLES]
RESULTS = ["FinishedRun", "Evaluated", "Restored", "Look"]  # what functions return or take: examples of these show it
ELSEWHERE = ["push"]  # its example needs a Hub: tests/test_hub.py runs it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/digits, of 1,000 timesteps as published models have, and runs of the other examples."""
    root = tmp_path_factory.mktemp("api")
    flags = [*TINY, "--max_train_steps=1", "--eval_batch_size=1", "--validation_split=0.1"]
    more = {
        "digits": ["--ddpm_num_steps=1000"],
        "mnist-conditional": ["--class_conditional"],
        "digits-classifier": ["--objective=classify"],
    }
    for name, of_run in more.items():
        ddpm_hf.train(parse_config([*flags, *of_run, f"--output_dir={root / 'runs' / name}"]))
    return root


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in [*RESULTS, *ELSEWHERE]])
def test_examples_give_what_they_say(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {each: getattr(ddpm_hf, each) for each in DESCRIBED} | {"ddpm_hf": ddpm_hf, "DDPMPipeline": DDPMPipeline}
    found = doctest.DocTestFinder(recurse=False).find(getattr(ddpm_hf, name), name, globs=names)
    for _, method in api.methods(getattr(ddpm_hf, name)):
        found += doctest.DocTestFinder(recurse=False).find(method, name, globs=names)
    assert any(test.examples for test in found)
    for test in found:
        said = []
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert not results.failed, "".join(said)
    shutil.rmtree(folder / "my-export", ignore_errors=True)
    ddpm_hf.METRICS.pop("brightness", None)  # an example adds it, and another adds a preset
    ddpm_hf.PRESETS.pop("mine", None)
    ddpm_hf.SAMPLERS.pop("faded", None)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_name_every_argument(name):
    value = getattr(ddpm_hf, name)
    if inspect.isclass(value):
        return
    for argument in inspect.signature(value).parameters:
        assert re.search(rf"\b{argument}\b", value.__doc__), argument
    assert "Raises:\n" in value.__doc__


def test_every_public_name_is_on_the_page():
    assert sorted(DESCRIBED) == sorted(set(ddpm_hf.__all__) - {"__version__"})
    assert (ROOT / "docs" / "python_api.md").read_text() == api.page(), "run: python docs/make_python_api.py"


def test_the_first_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """As it stands, but with fewer steps of a smaller network."""
    smaller = {"base_channels": 8, "max_train_steps": 2, "ddpm_num_inference_steps": 5, "eval_batch_size": 1}
    preset = PRESETS["digits"]
    monkeypatch.setitem(PRESETS, "digits", preset._replace(flags=preset.flags | smaller | {"layers_per_block": 1}))
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python_api.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    assert "bits_per_dim" in capsys.readouterr().out and (tmp_path / "digit.png").is_file()


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"has no attribute 'tarin': did you mean train\?"):
        _ = ddpm_hf.tarin
    assert {"train", "Sampler"} <= set(dir(ddpm_hf))


def test_a_finished_run_is_given_for_a_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = ddpm_hf.FinishedRun(folder=folder / "runs" / "digits", step=1, finished=True, signal=None, losses={})
    (image,) = ddpm_hf.sample(run, 1, "ddim", num_inference_steps=2)
    result = ddpm_hf.evaluate(run, metrics=["bits_per_dim"], suite="smoke", output=folder / "of_run.json")
    assert image.size == (8, 8) and "bits_per_dim" in repr(result)


def test_metrics_as_one_string():
    with pytest.raises(ddpm_hf.UserError, match=r"is a string: give a list of names, such as \['fid', 'kid'\]"):
        ddpm_hf.evaluate("no folder", metrics="fid,kid")
