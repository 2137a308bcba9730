"""`ddpm_hf restore`: the files it writes, its errors before it writes, and how it continues after a kill."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.community_pipelines import pipeline_file
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.sampling.masks import painted_pixels, read_mask, read_masks_in_memory
from ddpm_hf.sampling.restoration import restore


FEW = ["--num_inference_steps=2", "--num_samples=1"]


def save_grey(path, height=28, width=28, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(20, 236, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels.astype(int)


def save_colour(path, side=28):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    """A folder of four images of two sizes, and what is no image."""
    for k, size in enumerate([(28, 28), (20, 32), (28, 28), (20, 32)]):
        save_grey(tmp_path / "in" / f"{'bdac'[k]}.png", *size, seed=k)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_text("no image")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        sizes = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, add_attention=False)
        unet = UNet2DModel(sample_size=28, in_channels=3, out_channels=3, **blocks, **sizes)
    save_pipeline(tmp_path_factory.mktemp("colour"), unet, PaperDDPMScheduler.nichol_cosine(20))
    return tmp_path_factory.getbasetemp() / "colour0"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["restore", *map(str, arguments)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.png")}


def test_a_folder_of_several_sizes(tiny_run, images, tmp_path, capsys):
    main(["restore", str(tiny_run), str(images), str(tmp_path / "out"), "--task", "denoise"])
    said = capsys.readouterr().out
    assert "4 restored images" in said and "sigma" in said and "from 0." in said
    assert sorted(files(tmp_path / "out")) == ["a.png", "b.png", "c.png", "d.png"]
    for name in files(tmp_path / "out"):
        given, result = Image.open(images / name), Image.open(tmp_path / "out" / name)
        assert result.size == given.size and result.mode == "L"
        assert (np.asarray(result) != np.asarray(given)).mean() > 0.5
    sheet = Image.open(tmp_path / "out.sheet.png")
    assert sheet.width == 4 * 128 + 3 * 4 and sheet.height == 2 * 112 + 4
    shown = np.asarray(sheet)[:, :, 0]
    # 28x28 is enlarged four times, in the middle of 112x128; the results are below the inputs.
    assert np.array_equal(shown[:112:4, 8:120:4], pixels(images / "a.png"))
    assert np.array_equal(shown[116::4, 8:120:4], pixels(tmp_path / "out" / "a.png"))


def test_one_file_is_the_first_of_a_folder(tiny_run, images, tmp_path):
    flags = ["--task=super_resolution", "--scale_factor=2", *FEW]
    main(["restore", str(tiny_run), str(images), str(tmp_path / "all"), *flags, "--seed=7"])
    main(["restore", str(tiny_run), str(images / "a.png"), str(tmp_path / "new" / "one.png"), *flags, "--seed=7"])
    alone = pixels(tmp_path / "new" / "one.png")
    assert alone.shape == (56, 56)
    assert np.abs(alone - pixels(tmp_path / "all" / "a.png")).max() <= 1
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"one.png", "one.png.sheet.png"}
    main(["restore", str(tiny_run), str(images / "a.png"), str(tmp_path / "other.png"), *flags, "--seed=8"])
    assert np.abs(alone - pixels(tmp_path / "other.png")).max() > 1


def test_noise_levels_are_in_the_order_of_file_names(tiny_run, tmp_path):
    """Images of one size are restored together, so here in the order b, a, c."""
    (tmp_path / "noisy").mkdir()
    noise = np.random.default_rng(0)
    for name, size, level in [("a", 32, 0.3), ("b", 28, 0.1), ("c", 32, 0.02)]:
        array = np.clip(0.5 + level * noise.standard_normal((size, size)), 0, 1)
        Image.fromarray((255 * array).round().astype(np.uint8)).save(tmp_path / "noisy" / f"{name}.png")
    few = {"task": "denoise", "num_inference_steps": 1}
    together = restore(tiny_run, tmp_path / "noisy", tmp_path / "out", **few).noise_levels
    alone = [restore(tiny_run, tmp_path / "noisy" / f"{n}.png", tmp_path / f"{n}.png", **few) for n in "abc"]
    assert together == pytest.approx([one.noise_levels[0] for one in alone], rel=1e-3)
    assert together[0] > together[1] > together[2]


@pytest.mark.parametrize("task", ["denoise", "deblur"])
def test_batch_size_changes_nothing(tiny_run, images, tmp_path, task):
    for batch_size in (1, 16):
        flags = [f"--task={task}", "--num_inference_steps=3", "--num_samples=2", f"--batch_size={batch_size}"]
        main(["restore", str(tiny_run), str(images), str(tmp_path / f"{batch_size}"), *flags])
    for name in files(images):
        assert np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / "16" / name)).max() <= 1


def test_inpainting_keeps_what_is_black_in_the_mask(tiny_run, images, tmp_path):
    (tmp_path / "masks").mkdir()
    for path in images.glob("[abcd].png"):
        mask = np.zeros_like(pixels(path), dtype=np.uint8)
        mask[:, : 2 + "abcd".index(path.stem) * 4] = 1 if path.stem == "a" else 255  # segmentation tools write 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{path.stem}.bmp")
    flags = ["--task=inpaint", f"--mask={tmp_path / 'masks'}", *FEW]
    main(["restore", str(tiny_run), str(images), str(tmp_path / "out"), *flags])
    for path in images.glob("[abcd].png"):
        hidden = 2 + "abcd".index(path.stem) * 4
        changed = np.abs(pixels(tmp_path / "out" / path.name) - pixels(path))
        assert changed[:, hidden:].max() <= 2 < changed[:, :hidden].mean()
    flags = ["--task=inpaint", f"--mask={tmp_path / 'masks' / 'b.bmp'}", *FEW]
    main(["restore", str(tiny_run), str(images / "a.png"), str(tmp_path / "one.png"), *flags])
    changed = np.abs(pixels(tmp_path / "one.png") - pixels(images / "a.png"))
    assert changed[:, 6:].max() <= 2 < changed[:, :6].mean()


def strokes(mode, color):
    """A mask that an editor saves: transparent, but for a stroke of this color in 8:20, 8:20."""
    layer = Image.new("RGBA", (28, 28))
    layer.paste((*color, 255), (8, 8, 20, 20))
    if mode != "P":
        return layer.convert(mode)
    mask = Image.new("P", (28, 28), 1)
    mask.putpalette([*color, 255, 255, 255])
    mask.paste(0, (8, 8, 20, 20))
    mask.info["transparency"] = 1
    return mask


def named_grey_value():
    """A 16-bit mask whose tRNS chunk makes one grey value transparent."""
    values = np.full((28, 28), 65535, np.uint16)
    values[8:20, 8:20] = 0
    return Image.fromarray(values)


def on_black(layer):
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)


MASKS = {
    "white on transparent": (strokes("RGBA", (255, 255, 255)), {}),
    "black on transparent": (strokes("RGBA", (0, 0, 0)), {}),
    "red on transparent": (strokes("RGBA", (255, 0, 0)), {}),
    "grey and transparency": (strokes("LA", (40, 40, 40)), {}),
    "black in a palette": (strokes("P", (0, 0, 0)), {"transparency": 1}),
    "white in a palette": (strokes("P", (255, 255, 255)), {"transparency": 1}),
    "one grey value is transparent": (strokes("RGBA", (0, 0, 0)).getchannel("A"), {"transparency": 0}),
    "one grey value of 16 bits is transparent": (named_grey_value(), {"transparency": 65535}),
    "opaque everywhere": (on_black(strokes("RGBA", (255, 255, 255))), {}),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "options"), MASKS.values(), ids=MASKS)
def test_the_opaque_parts_of_a_mask_are_painted(tmp_path, mask, options):
    mask.save(tmp_path / "mask.png", **options)
    painted = read_mask(tmp_path / "mask.png")
    assert painted[8:20, 8:20].all() and painted.sum() == 144
    assert torch.equal(read_masks_in_memory([Image.open(tmp_path / "mask.png")])[0], painted)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16])
@pytest.mark.parametrize("white", [1, 255, 100_000])
def test_deep_masks_may_have_any_scale(dtype, white):
    values = np.zeros((4, 4), dtype)
    values[1, 2] = min(white, 65535)
    assert read_masks_in_memory(Image.fromarray(values)).nonzero().tolist() == [[1, 2]]


def test_a_turned_mask_is_turned_with_its_transparency(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned clockwise
    layer = Image.new("RGBA", (8, 4))
    layer.paste("white", (0, 0, 2, 1))  # top left, so top right when turned
    layer.save(tmp_path / "mask.png", exif=exif)
    painted = read_mask(tmp_path / "mask.png")
    assert painted.shape == (8, 4) and painted.sum() == 2 and painted[:2, 3].all()


def test_what_is_painted_is_said_and_nothing_else_changes(tiny_run, images, tmp_path, capsys):
    strokes("RGBA", (255, 255, 255)).save(tmp_path / "brush.png")
    flags = ["--task=inpaint", f"--mask={tmp_path / 'brush.png'}", *FEW]
    main(["restore", str(tiny_run), str(images / "a.png"), str(tmp_path / "one.png"), *flags])
    assert "The mask repaints 18.4 % of the pixels." in capsys.readouterr().out  # 144 of 784
    changed = np.abs(pixels(tmp_path / "one.png") - pixels(images / "a.png"))
    assert changed[8:20, 8:20].mean() > 2
    changed[8:20, 8:20] = 0
    assert changed.max() <= 2
    image, mask = Image.open(images / "a.png"), Image.open(tmp_path / "brush.png")
    settings = dict(task="inpaint", num_inference_steps=2, num_samples=1)
    assert np.array_equal(restore(tiny_run, image, mask=mask, **settings)[0], pixels(tmp_path / "one.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_levl": 0.1}, "did you mean noise_level"),
        ({"batch_size": 2.5}, "--batch_size is 2.5, but must be a whole number"),
        ({"noise_level": [0.1, 0.2]}, "--noise_level is .0.1, 0.2., but must be a number"),
        ({"num_samples": 2.0}, "--num_samples is 2.0, but must be a whole number"),
        ({"output": "out"}, "give the path of an image or of a folder of images, or leave the output out"),
        ({"task": "inpaint", "mask": [Image.new("L", (28, 28))]}, "1 masks for 2 images"),
    ],
    ids=["typing error", "batch size", "noise", "samples", "images and an output", "masks"],
)
def test_wrong_arguments_in_python_are_one_sentence(tiny_run, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    image = Image.new("L", (28, 28), 128)
    if mask := change.get("mask"):
        mask[0].paste(255, (4, 4, 9, 9))
    with pytest.raises(UserError, match=said):
        restore(tiny_run, [image, image], **{"task": "denoise"} | change)
    assert list(tmp_path.iterdir()) == []


def test_one_array_may_hold_all_images_and_masks(tiny_run):
    """Grey images may lack the axis of channels, and settings may be numbers of numpy."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    masks = images > 128
    settings = dict(task="inpaint", num_inference_steps=np.int64(1), num_samples=1, batch_size=2, seed=np.int64(3))
    wanted = restore(tiny_run, list(images), mask=list(masks), **settings)
    for form in (images, torch.from_numpy(images), images[..., None], images[:, ::-1][:, ::-1]):
        given = restore(tiny_run, form, mask=masks, **settings)
        assert len(given) == 3 and all(np.array_equal(one, other) for one, other in zip(given, wanted))


@pytest.mark.parametrize(
    ("color", "why"),
    [
        ((0, 0, 0, 255), "is black everywhere"),
        ((0, 0, 0, 0), "is transparent everywhere"),
        ((255, 255, 255, 255), "marks the whole image"),
        ((9, 9, 9, 128), "marks the whole image"),
    ],
)
def test_a_mask_of_nothing_or_all_is_refused(tiny_run, images, tmp_path, capsys, color, why):
    Image.new("RGBA", (28, 28), color).save(tmp_path / "mask.png")
    flags = ["--task=inpaint", f"--mask={tmp_path / 'mask.png'}"]
    assert why in refused(capsys, tiny_run, images / "a.png", tmp_path / "one.png", *flags)
    assert not (tmp_path / "one.png").exists()


def test_an_interrupted_folder_goes_on(tiny_run, images, tmp_path, capsys):
    arguments = ["restore", str(tiny_run), str(images), str(tmp_path / "out"), "--task=denoise"]
    main(arguments)
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "b.png").unlink()
    Image.new("L", (20, 32)).save(tmp_path / "out" / "c.png")  # so one sees that it is not drawn again
    kept = (tmp_path / "out" / "c.png").read_bytes()
    main(arguments)
    assert files(tmp_path / "out") == whole | {"c.png": kept}
    capsys.readouterr()
    assert "its files are not results" in refused(capsys, *arguments[1:], "--seed=1")
    assert files(tmp_path / "out") == whole | {"c.png": kept}
    save_grey(images / "a.png", seed=9)
    assert "its files are not results" in refused(capsys, *arguments[1:])
    main([*arguments, "--overwrite"])
    again = files(tmp_path / "out")
    assert again["c.png"] == whole["c.png"] and again["a.png"] != whole["a.png"]


def test_one_file_is_replaced_only_with_overwrite(tiny_run, images, tmp_path, capsys):
    arguments = [str(tiny_run), str(images / "a.png"), str(tmp_path / "a.png"), "--task=denoise"]
    (tmp_path / "a.png").write_bytes(b"mine")
    assert "--overwrite" in refused(capsys, *arguments)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    main(["restore", *arguments, "--overwrite"])
    assert Image.open(tmp_path / "a.png").size == (28, 28)


def test_deep_images_are_read_with_the_scale_of_the_training(tiny_run, tmp_path, capsys):
    values = save_grey(tmp_path / "eight.png").astype(np.uint16)
    Image.fromarray(values * 16).save(tmp_path / "twelve.png")  # white is 255 * 16
    shutil.copytree(tiny_run, tmp_path / "ct", ignore=shutil.ignore_patterns("evaluation*"))
    facts = json.loads((tiny_run / "train_config.json").read_text())
    facts["flags"]["pixel_range"] = [0.0, 4080.0]
    (tmp_path / "ct" / "train_config.json").write_text(json.dumps(facts))
    for model, name in [(tiny_run, "eight"), (tmp_path / "ct", "twelve"), (tiny_run, "twelve")]:
        if (tmp_path / f"{name}-out.png").exists():
            os.rename(tmp_path / f"{name}-out.png", tmp_path / "first.png")
            (tmp_path / f"{name}-out.png.sheet.png").unlink()
        main(
            ["restore", str(model), str(tmp_path / f"{name}.png"), str(tmp_path / f"{name}-out.png"), "--task=denoise"]
        )
        said = "of white, so they are almost black for the model" in capsys.readouterr().out
        assert said == (tmp_path / "first.png").exists()  # only the last model does not know the scale of the values
    assert np.array_equal(pixels(tmp_path / "eight-out.png"), pixels(tmp_path / "first.png"))


@pytest.mark.parametrize("of_a_folder", [True, False])
def test_a_sheet_and_a_link_of_the_user_stay(tiny_run, images, tmp_path, capsys, of_a_folder):
    place, output = (images, tmp_path / "out") if of_a_folder else (images / "a.png", tmp_path / "a.png")
    arguments = [str(tiny_run), str(place), str(output), "--task=denoise"]
    sheet = output.with_name(f"{output.name}.sheet.png")
    sheet.write_bytes(b"mine")
    assert f"{sheet} already exists, and the sheet of {output} would replace it" in refused(capsys, *arguments)
    assert sheet.read_bytes() == b"mine" and not output.exists()
    sheet.unlink()
    output.symlink_to(tmp_path / "nowhere")
    refused(capsys, *arguments)
    assert output.is_symlink() and not sheet.exists() and not (tmp_path / "nowhere").exists()


def test_colour(colour_model, tmp_path, capsys):
    save_grey(tmp_path / "in" / "grey.png")
    main(["restore", str(colour_model), str(tmp_path / "in"), str(tmp_path / "coloured"), "--task=colorize", *FEW])
    assert Image.open(tmp_path / "coloured" / "grey.png").mode == "RGB"
    save_colour(tmp_path / "in" / "colour.jpg")
    said = refused(capsys, colour_model, tmp_path / "in", tmp_path / "out", "--task=colorize")
    assert "colour.jpg has colors, but colorize takes grey" in said and not (tmp_path / "out").exists()
    main(["restore", str(colour_model), str(tmp_path / "in"), str(tmp_path / "out"), "--task=denoise"])
    assert {Image.open(tmp_path / "out" / f"{name}.png").mode for name in ("grey", "colour")} == {"RGB"}


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--task denoise --mask {masks}", "--mask applies only to --task inpaint"),
        ("--task denoise --scale_factor 2", "applies only to --task super_resolution"),
        ("--task inpaint", "needs a mask: give --mask"),
        ("--task inpaint --mask {masks}", "does not have exactly one mask for b.png"),
        ("--task inpaint --mask {small}", "is 4x4, but a.png is 28x28"),
        ("--task inpaint --mask nowhere.png", "does not have exactly one mask for a.png"),
        ("--task denoise --noise_level -0.1", "at least 0"),
        ("--task denoise --noise_level nan", "at least 0"),
        ("--task denoise --batch_size 0", "at least 1"),
        ("--task denoise --num_inference_steps 21", "num_inference_steps"),
        ("--task super_resolution --scale_factor 0", "scale_factor"),
        ("--task deblur --blur_sigma -1", "blur_sigma"),
        ("--task deblur --blur_sigma 1e30", "--blur_sigma is 1e+30; it must be at most 1,000 pixels"),
        ("--task colorize", "cannot be restored with"),
        ("--task sharpen", "there is no task 'sharpen': choose from denoise, inpaint"),
    ],
)
def test_bad_flags_are_one_sentence_and_leave_nothing(tiny_run, images, tmp_path, capsys, flags, wanted):
    save_grey(tmp_path / "masks" / "a.png")
    save_grey(tmp_path / "small.png", 4, 4)
    flags = flags.format(masks=tmp_path / "masks", small=tmp_path / "small.png").split()
    error = refused(capsys, tiny_run, images, tmp_path / "out", *flags)
    assert wanted in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in", "masks", "small.png"}


def test_bad_images_are_refused_before_any_is_written(tiny_run, images, tmp_path, capsys):
    def refuse(*flags):
        error = refused(capsys, tiny_run, images, tmp_path / "out", "--task=denoise", *flags)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.sheet.png").exists()
        return error

    save_grey(images / "odd.png", 28, 27)
    assert "odd.png cannot be restored with" in (error := refuse()) and "27" in error
    save_colour(images / "odd.png")
    assert "odd.png has colors, but the model" in refuse()
    whole = (images / "a.png").read_bytes()
    (images / "odd.png").write_bytes(whole[: len(whole) // 2])
    assert "odd.png cannot be read" in refuse()
    (images / "odd.png").write_text("no image")
    assert "odd.png cannot be read" in refuse()
    shutil.copy(images / "a.png", images / "a.tiff")
    assert "several images named a" in refuse()


def test_bad_places(tiny_run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "out"
    for given, output, wanted in [
        (tmp_path / "nowhere", out, "neither a file nor a folder"),
        (tmp_path / "empty", out, "has no image directly inside"),
        (images / "a.png", out, "ending in .png"),
        (images / "a.png", tmp_path / "out.jpg", "ending in .png"),
        (images / "a.png", images / "a.png", "give another name"),
        (images / "notes.txt", tmp_path / "out.png", "cannot be read"),
        (images, tmp_path / "file", "is a file or the same folder as INPUT"),
        (images, images, "is a file or the same folder as INPUT"),
        (images, tmp_path / "file" / "deeper", "nothing can be written in"),
    ]:
        assert wanted in refused(capsys, tiny_run, given, output, "--task=denoise")
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "empty", "file"}
    assert "Hub" in refused(capsys, "nobody/nothing", images, out, "--task=denoise")


def test_the_pipeline_s_file_is_found():
    assert "class RestorationPipeline" in pipeline_file("restoration").read_text()


@pytest.mark.parametrize("of_a_folder", [True, False])
def test_a_result_never_replaces_its_mask(tiny_run, images, tmp_path, capsys, of_a_folder):
    masks = shutil.copytree(images, tmp_path / "masks")
    before = {path.name: path.read_bytes() for path in masks.iterdir()}
    place, output = (images, masks) if of_a_folder else (images / "a.png", masks / "a.png")
    arguments = [str(tiny_run), str(place), str(output), "--task=inpaint", "--overwrite"]
    said = refused(capsys, *arguments, f"--mask={masks if of_a_folder else masks / 'a.png'}")
    assert "is the same file as the mask: give another OUTPUT." in said
    assert {path.name: path.read_bytes() for path in masks.iterdir()} == before


def test_a_mask_without_a_positive_value_is_refused():
    with pytest.raises(UserError, match="so there is nothing to paint"):
        painted_pixels(Image.fromarray(np.linspace(-1, 0, 16, dtype=np.float32).reshape(4, 4)), "the mask")
