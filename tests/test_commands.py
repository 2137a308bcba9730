"""The command line: it is quick, reports errors in one way, works by each of its names, and installs completely."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, TINY

from ddpm_hf import provenance
from ddpm_hf.__main__ import main, module_of, parse
from ddpm_hf.commands import COMMANDS
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.errors import suggestion
from ddpm_hf.evaluation import records
from ddpm_hf.training import run as training_run


HEAVY = {"torch", "diffusers", "datasets", "accelerate", "transformers", "numpy", "PIL", "gradio"}
TOKEN = "hf_" + "x" * 34


def python(*words, folder=ROOT, cwd=ROOT):
    """Run Python with the package in `folder`; return what it printed and the seconds that it worked."""
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, sum(after[2:4]) - sum(before[2:4])


# 0.15 and 0.3 s on a machine that does nothing else; a busy one is allowed five times that.
@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import ddpm_hf", 0.75),
        ("from ddpm_hf.__main__ import main; main(['--help'])", 1.5),
        ("from ddpm_hf.__main__ import main; main(['sample', '--help'])", 1.5),
        ("from ddpm_hf.__main__ import main; main(['presets'])", 1.5),
    ],
)
def test_it_answers_at_once(code, most):
    watch = "import atexit, sys; atexit.register(lambda: print('loaded:', *{n.split('.')[0] for n in sys.modules}))"
    said, seconds = python("-c", f"{watch}; {code}")
    loaded = said.rpartition("loaded: ")[2].split()
    assert "ddpm_hf" in loaded and not HEAVY & set(loaded)
    assert seconds < most


def test_the_listing_has_every_command_and_every_command_is_listed(capsys):
    files = {path.stem.replace("_", "-") for path in (ROOT / "ddpm_hf" / "commands").glob("*.py")}
    assert files - {"--init--", "flags"} == set(COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for command in COMMANDS:
        assert f"\n  {command:11} {module_of(command).__doc__.splitlines()[0]}\n" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and said.startswith(f"usage: ddpm_hf {command} ")
    assert f"\n{module_of(command).__doc__}" in said and f"\nddpm_hf {command} " in said


def test_what_is_meant_is_suggested():
    assert suggestion("smaple", COMMANDS) == "did you mean sample?"
    assert suggestion("xyz", ["a", "b"]) == "choose from a, b."
    assert suggestion("xyz", [f"--flag_{k}" for k in range(100)]) == "see --help."


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", ": error: a command is missing: choose from train, presets"),
        ("smaple x", ": error: there is no command 'smaple': did you mean sample?"),
        ("--versoin", ": error: there is no flag '--versoin': did you mean --version?"),
        ("sample x --num_image 3", " sample: error: there is no flag '--num_image': did you mean --num_images?"),
        ("sample x --num_image=3", " sample: error: there is no flag '--num_image': did you mean --num_images?"),
        ("sample --num_image 3", " sample: error: there is no flag '--num_image': did you mean --num_images?"),
        ("sample x --sampler dim", " sample: error: there is no sampler 'dim': did you mean ddim?"),
        ("sample x --sampler euler", " sample: error: there is no sampler 'euler': choose from ddpm, ddim, dpmsol"),
        ("sample x --num_images many", " sample: error: argument --num_images: invalid int value: 'many'; see --help"),
        ("sample x y", " sample: error: there is no flag 'y': see --help."),
        ("sample", " sample: error: the following arguments are required: model; see --help."),
        ("presets cifar", " presets: error: there is no preset 'cifar': did you mean cifar10?"),
        ("train --preset cifar", " train: error: there is no preset 'cifar': did you mean cifar10?"),
        ("train --los_type l1", " train: error: there is no flag '--los_type': did you mean --loss_type?"),
        ("train --loss_type huge_", " train: error: there is no --loss_type 'huge_': did you mean huber?"),
        ("train --loss_type mse", " train: error: there is no --loss_type 'mse': choose from l2, l1, huber."),
        ("train --preset digits --objective hybird", " train: error: --objective hybird is not known: did you mean "
         "hybrid?"),
        ("evaluate x --features digit", " evaluate: error: there is no --features 'digit': did you mean digits?"),
        ("train --preset mnist --seed=-1", " train: error: --seed is -1, but must be at least 0"),
        ("figures nowhere", " figures: error: nowhere is not a run with a pipeline"),
        ("compare nowhere.json", " compare: error: nowhere.json cannot be read as JSON"),
    ],
)  # fmt: skip
def test_every_refusal_is_one_sentence(line, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the folder of the tests may have a run of `make demo`
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.startswith(f"ddpm_hf{sentence}")
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("command", ["push run", "push-space me/x", "train --preset digits", "sample x", "presets"])
@pytest.mark.parametrize("words", ["--hub_tokn={}", "--hub_tokn {}", "--hub-tokens={}", "-hub_token={}", "digits {}"])
def test_a_token_in_a_mistyped_flag_is_not_shown(command, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), *words.format(TOKEN).split()])
    said = capsys.readouterr()
    assert "xxx" not in said.out + said.err
    assert stopped.value.code == 2 or words.startswith("-hub")  # which may be read as -h


@pytest.mark.parametrize("words", [["--hub_tokn=secret"], ["--hub_tokn", "secret"], ["--hub_tokn secret"]])
@pytest.mark.parametrize("command", [["push", "run"], ["train", "--preset=digits"]])
def test_no_value_of_an_unknown_flag_is_shown(command, words, capsys):
    with pytest.raises(SystemExit):
        main([*command, *words])
    assert capsys.readouterr().err.endswith("there is no flag '--hub_tokn': did you mean --hub_token?\n")


def test_train_takes_the_flags_of_the_script():
    flags = [*TINY, "--channel_mults", "1", "2", "--no_use_ema", "--output_dir=x"]
    assert parse(["train", *flags]).config == parse_config(flags)


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("/usr/bin/ddpm_hf", "ddpm_hf"),
        ("C:/Scripts/ddpm_hf.exe", "ddpm_hf"),
        (str(ROOT / "ddpm_hf" / "__main__.py"), "python -m ddpm_hf"),
        ("/opt/train_unconditional.py", "python train_unconditional.py"),
    ],
)
def test_a_program_is_named_as_it_was_started(script, shown, monkeypatch, capsys):
    words = ["sample", "/home/me/run", "--num_images", "many"]
    monkeypatch.setattr("sys.argv", [script, *words])
    assert provenance.command() == f"{shown} sample run --num_images many"
    if "train" not in script:
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err.startswith(f"{shown} sample: error: argument --num_images")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The files of a wheel that is built from a copy of the sources, with nothing else beside them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for name in ("ddpm_hf", "pipelines", "spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    python("-c", "from setuptools import build_meta; build_meta.build_wheel('.')", cwd=source)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_a_wheel_is_whole(unpacked):
    wanted = {
        path.relative_to(ROOT) for path in (ROOT / "ddpm_hf").rglob("*") if path.suffix in (".py", ".safetensors")
    }
    for name in ("pipelines", "spaces"):
        files = [path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(ROOT).parent / path.name for path in files}
    for path in sorted(wanted):
        place = unpacked / path if path.parts[0] == "ddpm_hf" else unpacked / "ddpm_hf" / path
        assert place.is_file() or path.name == "README.md" and path.parts[0] == "pipelines", path
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "[console_scripts]\nddpm_hf = ddpm_hf.__main__:main" in entry_points.read_text()


def test_it_trains_from_sources_that_are_not_installed(unpacked, tmp_path):
    """Only the package's files, no metadata of it, and none that an installation beside them has."""
    shutil.copytree(unpacked / "ddpm_hf", tmp_path / "alone" / "ddpm_hf")
    (tmp_path / "alone" / "sitecustomize.py").write_text("""
from importlib import metadata

known = metadata.version


def version(package):
    if package == "ddpm_hf":
        raise metadata.PackageNotFoundError(package)
    return known(package)


metadata.version = version
""")
    said, _ = python("-m", "ddpm_hf", "train", *TINY, "--dry_run", folder=tmp_path / "alone", cwd=tmp_path)
    assert "images of 8x8x1" in said
    # The facts of a run and the record of an evaluation ask one function.
    assert records.version is training_run.version is provenance.version
