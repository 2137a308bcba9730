"""`ddpm_hf convert`: pickled weights, bare UNets and checkpoints of diffusers' script become stock pipelines."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import untrained_unet
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.models.convert import convert
from ddpm_hf.models.pretrained import load_pretrained


def same_weights(unet, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in unet.state_dict().items())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders that `sample` does not open, and the UNets of which they were made."""
    root = tmp_path_factory.mktemp("sources")
    unet, averaged = untrained_unet(8, seed=1), untrained_unet(8, seed=2)
    scheduler = DDPMScheduler(10, prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(root / "pickled", safe_serialization=False)
    unet.save_pretrained(root / "bare")
    unet.save_pretrained(root / "checkpoint-500" / "unet")
    ema = EMAModel(averaged.parameters(), model_cls=type(averaged), model_config=averaged.config)
    ema.save_pretrained(root / "checkpoint-500" / "unet_ema")
    return root, unet, averaged


def drawn(folder):
    """Draw with the command, and return how many images there are."""
    main(["sample", str(folder), "--num_images=2", "--num_inference_steps=2", f"--output={folder}-drawn"])
    return len(list(folder.with_name(f"{folder.name}-drawn").glob("*.png")))


def test_pickled_weights_are_named_and_converted(sources, tmp_path, capsys):
    root, unet, _ = sources
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(root / "pickled"), f"--output={tmp_path / 'drawn'}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "drawn").exists()
    assert "because a pickle can run code" in said and f"`ddpm_hf convert {root / 'pickled'} NEW_FOLDER`" in said
    main(["convert", str(root / "pickled"), str(tmp_path / "new")])
    model = load_pretrained(tmp_path / "new")
    assert same_weights(model.unet, unet) and drawn(tmp_path / "new") == 2
    assert model.scheduler.config.prediction_type == "v_prediction" and len(model.scheduler) == 10
    assert not list((tmp_path / "new").rglob("*.bin")) and DDPMPipeline.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("name", ["bare", "checkpoint-500"])
def test_sample_of_a_unet_names_the_command(sources, name):
    with pytest.raises(UserError, match=f"so it is not a pipeline yet: .* with `ddpm_hf convert .*{name} NEW_FOLDER`"):
        load_pretrained(sources[0] / name)


def test_a_bare_unet_gets_the_schedule_of_the_flags(sources, tmp_path):
    root, unet, _ = sources
    main(["convert", str(root / "bare"), str(tmp_path / "default")])
    config = load_pretrained(tmp_path / "default").scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule, config.prediction_type) == (1000, "linear", "epsilon")
    flags = ["--ddpm_num_steps=20", "--ddpm_beta_schedule=squaredcos_cap_v2", "--prediction_type=sample"]
    main(["convert", str(root / "bare"), str(tmp_path / "other"), *flags])
    model = load_pretrained(tmp_path / "other")
    config = model.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (20, "squaredcos_cap_v2")
    assert config.prediction_type == "sample" and same_weights(model.unet, unet) and drawn(tmp_path / "other") == 2


@pytest.mark.parametrize("weights", ["published", "raw"])
def test_a_checkpoint_of_diffusers_script(sources, tmp_path, weights):
    root, unet, averaged = sources
    convert(root / "checkpoint-500", tmp_path / "new", weights=weights)
    assert same_weights(load_pretrained(tmp_path / "new").unet, averaged if weights == "published" else unet)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_what_cannot_be_converted_is_refused(sources, tmp_path, capsys, monkeypatch):
    root, _, _ = sources
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "pickled", "evil-pickle")
    (tmp_path / "evil-pickle" / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    shutil.copytree(root / "pickled", "no-weights")
    (tmp_path / "no-weights" / "unet" / "diffusion_pytorch_model.bin").unlink()
    shutil.copytree(root / "pickled", "a-list")
    torch.save([torch.zeros(1)], tmp_path / "a-list" / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for words, sentence in {
        "evil-pickle new": "evil-pickle cannot be loaded (it is damaged, or holds other things",
        "no-weights new": "it has neither safetensors nor diffusion_pytorch_model.bin",
        "a-list new": "holds other things than weights",
        "empty new": "empty has no config.json of a UNet: give",
        "other new": "it is a AutoencoderKL, not a UNet2DModel",
        "nowhere/x new": "is not a folder here",
        f"{root}/bare taken": "taken already exists",
        f"{root}/bare .": "which does not name a file or folder",
        f"{root}/pickled new --ddpm_num_steps=5": "has a scheduler of its own: leave --ddpm_num_steps out",
        f"{root}/bare new --ddpm_beta_schedule=lnear": "did you mean linear?",
        f"{root}/bare new --prediction_type=epsilo": "did you mean epsilon?",
        f"{root}/bare new --ddpm_num_steps=1000000000000": "must be from 1 to 100,000",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["convert", *words.split()])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and sentence in said, said
        assert sorted(tmp_path.rglob("*")) == before


def test_only_its_own_folder_is_written(tiny_run, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    main(["convert", str(tiny_run), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main(["convert", str(tiny_run), str(tmp_path / "link")])
    assert (tmp_path / ".out.tmp" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "link", "out"]
