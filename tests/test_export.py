"""Exports: stock diffusers loads the model and its pipelines where ddpm_hf is not installed."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from diffusers import DDPMPipeline, DiffusionPipeline
from test_guidance import run
from test_hub import OTHER_TOKEN, add_own_files


ALONE = """
import sys

sys.modules["ddpm_hf"] = None  # importing it fails
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

pipelines, *folders = sys.argv[1:]
image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
names = ["class_guided", "restoration", "reconstruction"]
for folder in folders:
    assert DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config.num_train_timesteps == 10
    for name, custom_pipeline in [(names[0], None), *zip(names, names), (names[0], f"{pipelines}/{names[0]}.py")]:
        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom_pipeline, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        if name == "class_guided":
            images = pipeline(class_labels=["3"], guidance_scale=2.0, num_inference_steps=2).images
        elif name == "restoration":
            images = pipeline(image, task="inpaint", mask=image[0, 0] > 0.5, num_inference_steps=2).images
        else:
            images = pipeline(image, num_inference_steps=2).images
        assert images[0].size == (8, 8) and images[0].mode == "L"
        print(folder, name)
"""


def test_an_exported_folder_needs_nothing_of_ours(guidance_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(guidance_models)
    names, folders = ["class_guided", "restoration", "reconstruction"], [tmp_path / "conditional", tmp_path / "plain"]
    for folder, more in zip(folders, ([], ["--classifier=classifier"])):
        assert run("export", folder.name, folder, *more) == 0
        assert ", ".join(names) in capsys.readouterr().out
        assert {path.stem for path in folder.glob("*.py")} == set(names)
        card = (folder / "README.md").read_text()
        assert all(f'custom_pipeline="{name}"' in card for name in names[1:])
        assert 'custom_pipeline="class_guided"' not in card
        assert json.loads((folder / "model_index.json").read_text())["_class_name"][0] == "class_guided"
    # One process draws from both, because it takes seconds to import diffusers.
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(ROOT / "pipelines"), *map(str, folders)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"{folder} ") for folder in folders] == [5, 5]


def test_a_plain_export_is_stock_unless_asked_and_brings_its_records(guidance_models, tmp_path, monkeypatch):
    monkeypatch.chdir(guidance_models)
    assert run("export", "plain", tmp_path / "stock") == 0
    assert type(DDPMPipeline.from_pretrained(tmp_path / "stock")) is DDPMPipeline
    assert run("export", "conditional", tmp_path / "mender", "--pipeline=restoration") == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "mender", trust_remote_code=True)
    assert type(pipeline).__name__ == "RestorationPipeline"
    flags = json.loads((tmp_path / "mender" / "train_config.json").read_text())["flags"]
    assert flags["output_dir"] == "conditional" and (tmp_path / "mender" / "figures" / "reverse.gif").is_file()
    assert "| Optimizer steps | 6 |" in (tmp_path / "mender" / "README.md").read_text()


def test_an_export_of_an_earlier_checkpoint_has_no_picture_or_line_of_later_weights(tmp_path):
    folder = shutil.copytree(ROOT / "tests" / "fixtures" / "run_5c3000a" / "run", tmp_path / "run")
    for name in ("samples/epoch_0001.png", "figures/loss.png"):
        (folder / name).parent.mkdir()
        shutil.copyfile(ROOT / "docs" / "images" / "mnist_steps.png", folder / name)
    for model, step, has_pictures in [(folder / "checkpoint-4", 4, False), (folder, 8, True)]:
        new = tmp_path / f"of step {step}"
        assert run("export", model, new) == 0
        card = (new / "README.md").read_text()
        assert f"| Optimizer steps | {step} |" in card and ("samples/epoch" in card) == has_pictures
        assert (new / "samples" / "epoch_0001.png").exists() == (new / "figures" / "loss.png").exists() == has_pictures


def test_the_card_of_an_export_names_its_folder_from_here(guidance_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("export", guidance_models / "plain", "exports/mine") == 0
    card = (tmp_path / "exports" / "mine" / "README.md").read_text()
    assert 'from_pretrained("exports/mine")' in card and ".mine-" not in card


def test_of_a_folder_full_of_own_files_only_those_of_the_run_are_exported(guidance_models, tmp_path, caplog):
    folder = shutil.copytree(guidance_models / "conditional", tmp_path / "full")
    (folder / "best/unet").mkdir(parents=True)
    (folder / "classifier").mkdir()
    add_own_files(folder, tmp_path / "elsewhere")
    assert run("export", folder, tmp_path / "new") == 0
    files = {path.relative_to(tmp_path / "new").as_posix(): path for path in (tmp_path / "new").rglob("*")}
    files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    names = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "class_guided.py"}
    names |= {"unet/diffusion_pytorch_model.safetensors", "restoration.py", "reconstruction.py", "README.md"}
    names |= {"train_config.json", "metrics.jsonl", "evaluations/finished.json", "samples/epoch_0001.png"}
    figures = {name for name in files if name.startswith("figures/")}
    assert set(files) == names | figures and {"figures/loss.png", "figures/reverse.gif"} <= figures
    assert not figures & {"figures/forward.png", "figures/id_rsa", "figures/me.png", "figures/reverse.png"}
    ours = {name: content for name, content in files.items() if not name.endswith(".py")}
    words = ("of my diary", OTHER_TOKEN, str(tmp_path), str(guidance_models), '"_name_or_path"')
    assert not any(word.encode() in content for word in words for content in ours.values())
    assert "reverse.png holds an access token" in caplog.text


def test_an_export_touches_nothing_beside_it_and_leaves_nothing_when_it_fails(guidance_models, tmp_path, capsys):
    folder = shutil.copytree(guidance_models / "conditional", tmp_path / "model")
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp/mine.txt").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = {*tmp_path.iterdir()}
    (folder / "train_config.json").write_text("{")
    assert run("export", folder, tmp_path / "new") == 2
    (folder / "train_config.json").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss"')
    assert run("export", folder, tmp_path / "link") == 2 and run("export", folder, tmp_path / "caf\udce9") == 2
    error = capsys.readouterr().err
    for part in ("cannot be read as JSON", "link to a file that does not exist", "is in a path that is not UTF-8"):
        assert part in error
    assert {*tmp_path.iterdir()} == before
    assert run("export", folder, tmp_path / "new") == 0
    assert {*tmp_path.iterdir()} == before | {tmp_path / "new"} and (tmp_path / ".new.tmp/mine.txt").is_file()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["plain", "conditional"], "conditional already exists"),
        (["plain", "new", "--pipeline=class_guided"], "does not suit this model: choose from restoration,"),
        (["conditional", "new", "--classifier=classifier"], "this model is conditional"),
        (["plain", "new", "--classifier=plain"], "the classifier in plain cannot be loaded"),
    ],
)
def test_what_cannot_be_exported_is_refused(guidance_models, arguments, sentence, monkeypatch, capsys):
    monkeypatch.chdir(guidance_models)
    assert run("export", *arguments) == 2
    assert sentence in capsys.readouterr().err and not (guidance_models / "new").exists()
