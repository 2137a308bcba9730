"""Models, checkpoints, samples and records of another shape: one sentence, before anything is written."""

import io
import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, make_run, untrained_unet
from PIL import Image
from space_server import save_model
from test_space_model import UNUSABLE, edited

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.evaluation import inputs
from ddpm_hf.files import parse_json
from ddpm_hf.models import judge
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.sampling.sample_set import read_samples


DRAW = ["--num_images=2", "--num_inference_steps=2", "--sampler=ddim"]


def refused(capsys, *words):
    """Run a command that must refuse; return its one sentence."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def everything(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def with_index(**values):
    return lambda model: edited_index(model, values)


def edited_index(model, values):
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_run(content):
    return lambda model: (model / "train_config.json").write_text(json.dumps(content))


def a_pipe(model):
    (model / "unet" / "config.json").unlink()
    os.mkfifo(model / "unet" / "config.json")


def without_half_of_the_weights(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: weights[name] for name in list(weights)[::2]}, path)


FOREIGN = UNUSABLE | {
    "T null": edited("scheduler", num_train_timesteps=None),
    "betas that are nan": edited("scheduler", trained_betas=[float("nan")] * 10),
    "betas that add no noise": edited("scheduler", beta_start=0, beta_end=0),
    "betas that leave no signal": edited("scheduler", beta_end=1.0),
    "fewer betas than timesteps": edited("scheduler", trained_betas=[0.1] * 9),
    "unknown variance": edited("scheduler", variance_type="wide"),
    "a variance that is not predicted": edited("scheduler", variance_type="learned_range"),
    "clipping to text": edited("scheduler", clip_sample_range="one"),
    "channels in a list": edited("unet", in_channels=[]),
    "heads of zero": edited("unet", attention_head_dim=0),
    "an epsilon of nan": edited("unet", norm_eps=float("nan")),
    "an activation that does not exist": edited("unet", act_fn="bang"),
    "widths without end": edited("unet", block_out_channels=[10**9, 10**9]),
    "blocks that do not exist": edited("unet", down_block_types=["DownBlock2D", "os.system"]),
    "classes by identity": edited("unet", class_embed_type="identity"),
    "classes by timestep": edited("unet", class_embed_type="timestep"),
    "classes by projection": edited("unet", class_embed_type="projection"),
    "a part with a line break": with_index(scheduler=["diffusers", "\n\x1b[31m"]),
    "an index that is a number": lambda model: (model / "model_index.json").write_text("3"),
    "class names of text": with_index(id2label="cat"),
    "class names in a list": with_index(id2label=["cat"]),
    "class names without numbers": with_index(id2label={"a": "cat"}),
    "class names that are numbers": with_index(id2label={"0": 3}),
    "a config that is a pipe": a_pipe,
    "half of the weights": without_half_of_the_weights,
}
OF_A_RUN = {
    "a run that is a list": with_run([]),
    "flags that are a list": with_run({"flags": []}),
    "a flag that is an object": with_run({"flags": {"dataset_name": {"a": 1}}}),
    "a preset that is a list in a list": with_run({"flags": {"preset": [["mnist"]]}}),
    "a commit that is a number": with_run({"git_commit": 5}),
    "a command that is a list": with_run({"command": ["rm"]}),
}


@pytest.mark.parametrize("name", FOREIGN | OF_A_RUN)
def test_a_model_is_refused_before_anything_is_written(name, tmp_path, capsys):
    model = save_model(tmp_path / "model", 10)
    (FOREIGN | OF_A_RUN)[name](model)
    before = sorted(tmp_path.rglob("*"))
    said = refused(capsys, "sample", model, *DRAW, f"--output={tmp_path / 'drawn'}")
    assert said.startswith(f"ddpm_hf sample: error: {tmp_path}") and len(said) < 900
    assert sorted(tmp_path.rglob("*")) == before


CARDS = OF_A_RUN | {name: FOREIGN[name] for name in FOREIGN if name.startswith("class names")}


@pytest.mark.parametrize("name", CARDS)
def test_no_card_is_written_of_odd_records(name, tmp_path, capsys):
    model = save_model(tmp_path / "model", 10)
    CARDS[name](model)
    before = sorted(tmp_path.rglob("*"))
    assert str(model) in refused(capsys, "card", model)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_sentence_names_the_entry_and_what_it_must_be(tmp_path):
    edited("unet", sample_size=-8)(save_model(tmp_path / "model", 10))
    with pytest.raises(
        UserError, match="its sample_size is -8, but must be one or two whole numbers from 1 to 2048"
    ) as error:
        load_pretrained(tmp_path / "model")
    assert str(error.value).endswith(": give a folder or Hub id of a whole pipeline, or repair this one.")


def test_a_space_has_its_own_copy_of_the_judge(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "spaces"))
    import model as of_space

    from ddpm_hf.sharing.space import write_space

    write_space(tmp_path, "me/x")
    monkeypatch.setattr(of_space, "HERE", tmp_path)
    assert of_space.shared_module("judge").__file__ == str(tmp_path / "judge.py")
    of_space.open_model(str(save_model(tmp_path / "model", 10)))


def test_a_space_has_the_files_of_the_repository_and_no_others(tmp_path):
    """A clone may hold notes of its user beside them."""
    from ddpm_hf.sharing.space import write_space

    write_space(tmp_path, "me/x")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files = [path for part in ("spaces", "pipelines") for path in (ROOT / part).rglob("*") if path.is_file()]
    known = {path.relative_to(ROOT).as_posix().removeprefix("spaces/") for path in files if path.suffix != ".pyc"}
    known.remove("pipelines/README.md")
    assert known and written == known | {"judge.py", "hub_requests.py"}


def test_a_pipeline_of_dpm_solver_draws_by_ddpm(tmp_path):
    """Its scheduler has no variance type."""
    folder = save_model(tmp_path / "model", 10)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": None}))
    assert len(ddpm_hf.sample(folder, 1)) == 1
    assert load_pretrained(folder).scheduler.config.variance_type == "fixed_small"


def test_names_of_a_part_of_the_classes_are_refused(tmp_path):
    """With 2 names and 4 embeddings, nobody knows which embedding means "no class"."""
    unet = {"sample_size": 8, "num_class_embeds": 4}
    with pytest.raises(ValueError, match="names 2 classes, but its num_class_embeds is 4"):
        judge.check_unet(unet, {"id2label": {"0": "a", "1": "b"}})


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_that_are_neither_grey_nor_rgb_are_drawn_and_restored(channels, tmp_path, capsys):
    model = save_model(tmp_path / "model", 10, channels=channels)
    for output in ("drawn", "drawn.npz"):
        main(["sample", str(model), *DRAW, f"--output={tmp_path / output}"])
    images = read_samples(tmp_path / "drawn").images
    assert images.shape == (2, channels, 8, 8) and torch.equal(images, read_samples(tmp_path / "drawn.npz").images)
    given = next(tmp_path.glob("drawn/000000.*"))
    assert given.suffix == (".png" if channels < 5 else ".npy")
    main(["restore", str(model), str(given), str(tmp_path / f"b{given.suffix}"), "--task=denoise"])
    Image.new("F", (8, 8)).save(tmp_path / "a.tif")
    before = everything(tmp_path)
    capsys.readouterr()
    said = refused(capsys, "restore", model, tmp_path / "a.tif", tmp_path / f"c{given.suffix}", "--task=denoise")
    assert f"it is a picture of mode F, but images of {channels} channels are wanted: give" in said
    said = refused(capsys, "restore", model, given, tmp_path / f"c{given.suffix}", "--task=colorize")
    assert everything(tmp_path) == before


CHECKPOINT = ROOT / "tests" / "fixtures" / "run_5c3000a" / "run" / "checkpoint-4"


def with_saved(**values):
    """Return a function that changes entries of a checkpoint's train_config.json. None removes an entry."""

    def edit(folder):
        path = folder / "train_config.json"
        saved = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in saved.items() if value is not None}))

    return edit


def with_flag(name, value):
    def edit(folder):
        path = folder / "train_config.json"
        saved = json.loads(path.read_text())
        saved["flags"][name] = value
        path.write_text(json.dumps(saved))

    return edit


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def weights_of_nan(folder):
    path = folder / "ema.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: torch.full_like(each, torch.nan) for name, each in weights.items()}, path)


DAMAGES = {
    "weights cut": cut("ema.safetensors", 1000),
    "weights empty": cut("ema.safetensors", 0),
    "weights of another model": lambda folder: safetensors.torch.save_file(
        untrained_unet(8).state_dict(), folder / "ema.safetensors"
    ),
    "weights that are not numbers": weights_of_nan,
    "no config": lambda folder: (folder / "train_config.json").unlink(),
    "a config that is a list": lambda folder: (folder / "train_config.json").write_text("[]"),
    "a config that is empty": lambda folder: (folder / "train_config.json").write_text("{}"),
    "no flags": with_saved(flags=None),
    "no UNet": with_saved(unet=None),
    "a UNet of text": with_saved(unet="UNet2DModel"),
    "a UNet that is too large": with_saved(unet={"sample_size": 8, "block_out_channels": [16_384] * 4}),
    "class names of numbers": with_saved(class_names=[1, 2]),
    "T without end": with_flag("ddpm_num_steps", 10**12),
    "T of text": with_flag("ddpm_num_steps", "ten"),
    "an unknown schedule": with_flag("ddpm_beta_schedule", "steep"),
    "an unknown prediction": with_flag("prediction_type", "guess"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(damage, tmp_path, capsys):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-4")
    DAMAGES[damage](folder)
    before = everything(tmp_path)
    said = refused(capsys, "sample", folder, *DRAW, f"--output={tmp_path / 'drawn'}")
    assert str(folder) in said and everything(tmp_path) == before


def test_a_checkpoint_of_another_name_is_sampled(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "saved")
    assert load_pretrained(folder).facts["train_step"] is None


def test_a_model_does_not_say_where_evaluate_writes(tmp_path, digit_folder, monkeypatch):
    model = make_run(tmp_path / "model", digit_folder)
    path = model / "train_config.json"
    run = json.loads(path.read_text())
    where = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "logging_dir": "../logs"}
    path.write_text(json.dumps(run | {"flags": run["flags"] | where | {"hub_model_id": "me/x", "push_to_hub": True}}))
    taken, images = [], SimpleNamespace(warnings=[])
    monkeypatch.setattr(inputs, "load_images", lambda config, channels: taken.append(config) or (images, None))
    inputs.open_data({}, load_pretrained(model), None, calibrate=False, resolution=28)
    assert taken[0].dataset_name == str(digit_folder) and taken[0].validation_split == "test"
    assert (taken[0].cache_dir, taken[0].hub_model_id, taken[0].push_to_hub) == (None, None, False)
    assert taken[0].output_dir not in where.values()


def a_bomb(path):
    """Write the start of a PNG of 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)))


def a_text_bomb(path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("a", "a" * 2_000_000, zip=True)
    Image.new("L", (8, 8)).save(path, pnginfo=info)


def npz_member(path, name, content, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", content, **options)


def header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


SAMPLER = {"method": "ddim", "num_inference_steps": 2, "class_labels": None}
RECORD = {"schema": "ddpm_hf.samples/1", "model": {"unet_sha256": "0"}, "sampler": SAMPLER, "num_images": 1}
SETS = {
    "a bomb": lambda folder: a_bomb(folder / "000000.png"),
    "a bomb of text": lambda folder: a_text_bomb(folder / "000000.png"),
    "half an image": lambda folder: (folder / "000000.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "a pipe": lambda folder: os.mkfifo(folder / "000000.png"),
    "a record without a number": {"num_images": None},
    "a number of text": {"num_images": "3"},
    "a number without end": {"num_images": 10**7 + 1},
    "a sampler of text": {"sampler": "ddim"},
    "a method that is a path": {"sampler": SAMPLER | {"method": "../../x"}},
    "a model that is a list": {"model": []},
    "labels without names": {"sampler": SAMPLER | {"class_labels": [3], "class_names": ["cat"]}},
}
ARRAYS = {
    "a huge header": lambda path: npz_member(path, "arr_0", header((4_000_000, 32, 32, 3))),
    "a bomb": lambda path: npz_member(path, "arr_0", header((100_001, 32, 32, 1)) + bytes(100_001 * 1024)),
    "no numbers": lambda path: npz_member(path, "arr_0", b"hello"),
    "objects": lambda path: np.savez(path, arr_0=np.array([{}], dtype=object)),
    "no images": lambda path: np.savez(path, arr_0=np.zeros((0, 8, 8, 1), np.uint8)),
    "only a record": lambda path: np.savez(path, meta="{}"),
    "nothing": lambda path: np.savez(path),
    "a bad record": lambda path: np.savez(
        path, arr_0=np.zeros((2, 8, 8, 1), np.uint8), meta=json.dumps(RECORD | {"sampler": []})
    ),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", SETS)
def test_a_folder_of_samples_of_another_shape_is_one_sentence(name, tmp_path, capsys):
    odd = SETS[name]
    if isinstance(odd, dict):
        Image.new("L", (8, 8)).save(tmp_path / "000000.png")
        (tmp_path / "samples.json").write_text(json.dumps(RECORD | odd))
    else:
        odd(tmp_path)
    said = refused(capsys, "evaluate", tmp_path, "--dataset_name=digits", f"--output={tmp_path / 'new' / 'a.json'}")
    assert str(tmp_path) in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ARRAYS)
def test_an_npz_of_another_shape_is_one_sentence(name, tmp_path, capsys):
    ARRAYS[name](tmp_path / "a.npz")
    said = refused(capsys, "evaluate", tmp_path / "a.npz", "--dataset_name=digits", f"--output={tmp_path}/new/a.json")
    assert str(tmp_path / "a.npz") in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("meta", ["no JSON", "[]", "[" * 10**5, '{"author": "me"}', '"\\ud800"'])
def test_a_note_of_another_program_in_an_npz_is_no_record(meta, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8), meta=meta)
    assert read_samples(tmp_path / "a.npz").sampler == {}


ENTRY = {"id": "fid", "value": 1.0, "se": None, "floor": None, "n_gen": 2, "n_ref": 2}
SCORES = {
    "schema": "ddpm_hf.eval/1",
    "command": "ddpm_hf evaluate x",
    "model": {"name": "x"},
    "sampler": SAMPLER,
    "data": {"name": "digits", "train": {"n": 3}, "held_out": None},
    "metrics": [ENTRY],
    "cost": {"drawing_s": 1, "scoring_s": 1},
}
ODD_SCORES = {
    "no metrics": {"metrics": None},
    "metrics in an object": {"metrics": {"fid": 1}},
    "a metric without an id": {"metrics": [{**ENTRY, "id": None}]},
    "a value of text": {"metrics": [{**ENTRY, "value": "low"}]},
    "a metric without a value": {"metrics": [{"id": "fid"}]},
    "extra text": {"metrics": [{**ENTRY, "extra": "x"}]},
    "data of text": {"data": "digits"},
    "a method that is a list": {"sampler": {"method": []}},
    "a command that is a list": {"command": []},
    "deep": {"env": json.loads("[" * 100 + "]" * 100)},
}


def test_whole_records_are_compared(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(SCORES))
    main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "fid" in capsys.readouterr().out
    once = tmp_path / "a.json"
    said = refused(capsys, "compare", once, tmp_path / "b.json", once)
    assert "a.json is given 2 times: give each record once." in said
    with pytest.raises(UserError, match="there is nothing to compare"):
        ddpm_hf.compare()


@pytest.mark.parametrize("name", ODD_SCORES)
def test_a_record_of_another_shape_is_one_sentence(name, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(SCORES | ODD_SCORES[name]))
    assert str(tmp_path / "a.json") in refused(capsys, "compare", tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"[" * 10**5, b"{", b"7"])
def test_a_record_of_restorations_that_cannot_be_read_is_one_sentence(content, tmp_path, tiny_run, capsys):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        Image.new("L", (28, 28)).save(tmp_path / name / "a.png")
    (tmp_path / "out" / "restoration.json").write_bytes(content)
    before = everything(tmp_path)
    refused(capsys, "restore", tiny_run, tmp_path / "in", tmp_path / "out", "--task=denoise")
    assert everything(tmp_path) == before


def test_json_is_bounded():
    assert parse_json('{"a": [1, "\\ud83c\\udfb2"]}') == {"a": [1, "\U0001f3b2"]}
    for text in ("[" * 65 + "]" * 65, "[" * 10**6, '["\\ud800"]', '{"\\ud800": 1}', "[1" + "0" * 5000 + "]", "{"):
        with pytest.raises(ValueError):
            parse_json(text)


FLAGS = {
    "a seed of 65 bits": (["--seed", 2**64], "--seed is 18446744073709551616, but must be a whole number"),
    "a seed whose sum overflows": (["--seed", 2**64 - 1], "--seed is 18446744073709551615, but must be"),
    "a seed far below zero": ([f"--seed={-(2**63) - 1}"], "but must be a whole number from -2^63"),
    "a class in superscript": (["--class_labels", "²"], "this model has no classes"),
    "a class of many digits": (["--class_labels", "9" * 5000], "this model has no classes"),
    "timesteps of many digits": (["--timesteps", "9" * 5000], "choose quad"),
    "images without end": (["--num_images", 10**12], "--num_images is 1000000000000; a set of samples has at most"),
    "output without a name": (["--output="], "--output is '', which does not name a file"),
    "output here": (["--output", "."], "which does not name a file or folder: give a name"),
    "output above": (["--output", ".."], "which does not name a file or folder: give a name"),
    "output at the root": (["--output", "/"], "which does not name a file or folder: give a name"),
    "output with a long name": (["--output", "a" * 300], "--output has a name of more than 230 bytes"),
    "output below a file": (["--output", "{folder}/file/drawn"], "but nothing can be written in {folder}/file: give"),
    "output to a folder of an .npz": (["--output", "{folder}/set.npz"], "is a folder, but a name ending in .npz"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_cannot_be_are_refused_before_anything_is_written(name, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "set.npz").mkdir()
    flags, sentence = FLAGS[name]
    before = everything(tmp_path)
    said = refused(capsys, "sample", tiny_run, *DRAW, *(str(flag).format(folder=tmp_path) for flag in flags))
    assert sentence.format(folder=tmp_path) in said and everything(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        "evaluate {run} --metrics=bits_per_dim --output=",
        "evaluate {run} --metrics=bits_per_dim --output={long}.json",
        "evaluate {run} --metrics=nothing --output=new/a.json",
        "evaluate {run} --metrics=bits_per_dim --num_images=39000000 --output=new/a.json",
        "evaluate {run} --metrics=bits_per_dim --dataset_name=nowhere --output=new/a.json",
        "evaluate {run} --metrics=bits_per_dim --samples_dir= --output=new/a.json",
        "evaluate {run} --metrics=fid --inception=nowhere --output=new/a.json",
        "restore {run} in.png {long}.png --task=denoise",
        "restore {run} {long}.png out.png --task=denoise",
        "restore {run} in.png out.png --task=denoise --seed=18446744073709551616",
        "restore {run} in.png out.png --task=denoise --num_samples=1000000000000",
        "restore {run} in.png out.png --task=denoise --noise_level=inf",
        "restore {run} in.png out.png --task=super_resolution --scale_factor=1000000",
        "export {run} {long}",
        "export {run} /",
        "sample {long}",
        "card {long}",
        "figures {long}",
        "compare {long}",
        "sample {run} --classifier {long}",
    ],
)
def test_other_commands_write_nothing_either(words, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28)).save("in.png")
    before = everything(tmp_path)
    refused(capsys, *words.format(run=tiny_run, long="a" * 300).split())
    assert everything(tmp_path) == before


def test_a_class_in_superscript_is_no_number(tmp_path, capsys):
    model = save_model(tmp_path / "model", 10, ["cat", "dog"])
    said = refused(capsys, "sample", model, *DRAW, "--class_labels", "²", f"--output={tmp_path / 'drawn'}")
    assert "--class_labels has '²', but the classes of this model are cat, dog" in said


def test_a_large_seed_draws(tmp_path):
    save_pipeline(tmp_path / "model", untrained_unet(8), PaperDDPMScheduler.nichol_cosine(5))
    main(["sample", str(tmp_path / "model"), *DRAW, f"--seed={2**63 - 1}", f"--output={tmp_path / 'drawn'}"])
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
