"""Sets of samples: image k is the same on any number of processes and after kills; impossible requests are errors."""

import json
import multiprocessing
import random
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import make_run
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.pictures import to_uint8
from ddpm_hf.sampling.sample_set import draw_samples, duration, read_samples
from ddpm_hf.sampling.samplers import draw, image_generators
from ddpm_hf.sampling.settings import Sampler


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_pretrained(str(tiny_run))


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    """23 images drawn in one go."""
    sampler = Sampler(name="ddim", num_inference_steps=5, seed=3).resolve(model)
    return draw_samples(model, sampler, 23, tmp_path_factory.mktemp("samples") / "a", batch_size=4)


def test_image_k_is_that_of_seed_plus_k(model, unbroken):
    generators = image_generators(3, [7])
    alone = draw(model.unet, model.scheduler, generators, sampler="ddim", num_inference_steps=5, spacing="trailing")
    drawn = np.asarray(Image.open(unbroken / "000007.png")).astype(int)
    assert np.abs(to_uint8(alone)[0, 0].numpy().astype(int) - drawn).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_batch_size_changes_nothing(model, unbroken, tmp_path, batch_size):
    sampler = Sampler(name="ddim", num_inference_steps=5, seed=3).resolve(model)
    draw_samples(model, sampler, 23, tmp_path / "b", batch_size=batch_size)
    other = read_samples(tmp_path / "b").images
    difference = (other.int() - read_samples(unbroken).images.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_killed_three_times_it_ends_with_the_same_bytes(model, tmp_path):
    sampler = Sampler().resolve(model)
    draw_samples(model, sampler, 60, tmp_path / "whole", batch_size=4)
    moments, killed = random.Random(0), tmp_path / "killed"
    for _ in range(3):
        job = multiprocessing.get_context("fork").Process(
            target=draw_samples,
            args=(model, sampler, 60, killed),
            kwargs={"batch_size": 4},
        )
        job.start()
        wanted = len(files(killed)) + moments.randint(1, 12)
        while len(files(killed)) < wanted:
            assert job.is_alive(), "it ended before it could be killed"
            time.sleep(0.005)
        job.kill()
        job.join()
        left = len(files(killed))
        assert wanted <= left < 60
        with pytest.raises(UserError, match=f"has only {left} of 60 images"):
            read_samples(killed)
    draw_samples(model, sampler, 60, killed, batch_size=4)
    assert files(killed) == files(tmp_path / "whole")
    assert not list(killed.glob(".*.tmp"))


def test_npz_has_the_same_images_and_says_how_they_were_drawn(tiny_run, unbroken, tmp_path):
    flags = f"sample {tiny_run} --sampler ddim --num_inference_steps 5 --seed 3 --num_images 23 --batch_size 4".split()
    main([*flags, "--output", str(tmp_path / "a.npz")])
    samples = read_samples(tmp_path / "a.npz")
    assert torch.equal(samples.images, read_samples(unbroken).images)
    assert samples.sampler["seed"] == 3 and samples.sampler["timesteps"] == "trailing"
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (23, 28, 28, 1) and arrays["arr_0"].dtype == np.uint8
    assert not (tmp_path / "a.npz.parts").exists()
    assert Image.open(tmp_path / "a.npz.sheet.png").size[0] > 4 * 28


def test_an_npz_goes_on_too_and_one_of_somebody_else_stays(model, tiny_run, tmp_path):
    sampler = Sampler(name="ddim", num_inference_steps=2).resolve(model)
    path = draw_samples(model, sampler, 4, tmp_path / "a.npz", batch_size=4)
    first = read_samples(path).images
    draw_samples(model, sampler, 8, path, batch_size=4)
    assert torch.equal(read_samples(path).images[:4], first) and len(read_samples(path).images) == 8
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((3, 28, 28, 1), np.uint8))
    with pytest.raises(UserError, match="is not a set of samples of ddpm_hf"):
        draw_samples(model, sampler, 4, tmp_path / "b.npz", batch_size=4)


def test_somebody_else_s_samples_json_is_no_record(model, tmp_path):
    (tmp_path / "samples.json").write_text('{"author": "me"}')
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    assert read_samples(tmp_path).sampler == {}
    with pytest.raises(UserError, match="is not a set of samples of ddpm_hf"):
        draw_samples(model, Sampler().resolve(model), 4, tmp_path, batch_size=4)


def test_a_larger_number_goes_on_and_another_sampler_is_refused(model, unbroken, tmp_path):
    sampler = Sampler(name="ddim", num_inference_steps=2).resolve(model)
    draw_samples(model, sampler, 4, tmp_path / "c", batch_size=4)
    first = files(tmp_path / "c")
    draw_samples(model, sampler, 8, tmp_path / "c", batch_size=4)
    assert len(files(tmp_path / "c")) == 8 and first.items() <= files(tmp_path / "c").items()
    draw_samples(model, sampler, 6, tmp_path / "c", batch_size=4)
    assert len(read_samples(tmp_path / "c").images) == 6
    other = Sampler(name="ddim", num_inference_steps=3).resolve(model)
    with pytest.raises(UserError, match="num_inference_steps: 2 for those samples, 3 for the new ones"):
        draw_samples(model, other, 8, tmp_path / "c", batch_size=4)


def test_a_folder_of_somebody_else_is_left_alone(model, tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    sampler = Sampler(name="ddim", num_inference_steps=2).resolve(model)
    with pytest.raises(UserError, match="is not a set of samples of ddpm_hf"):
        draw_samples(model, sampler, 2, tmp_path, batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_variance_unless_told_otherwise(tmp_path, digit_folder):
    model = load_pretrained(str(make_run(tmp_path / "large", digit_folder, variance_type="fixed_large")))
    assert Sampler().resolve(model).variance_type == "fixed_large"
    assert Sampler(num_inference_steps=5).resolve(model).variance_type == "fixed_small"
    told = Sampler(num_inference_steps=5, variance_type="fixed_large").resolve(model)
    assert told.variance_type == "fixed_large"
    assert Sampler(name="ddim").resolve(model).variance_type is None


def test_a_first_step_far_from_noise_is_told(model):
    assert Sampler(name="ddim", num_inference_steps=5).resolve(model).warnings(model) == []
    (warning,) = Sampler(name="ddim", num_inference_steps=5, timesteps="leading").resolve(model).warnings(model)
    assert "t = 16" in warning and "trailing" in warning


def test_timesteps_may_be_listed(model, tmp_path):
    sampler = Sampler(name="ddim", timesteps="19,7,0").resolve(model)
    assert sampler.timesteps == (19, 7, 0) and sampler.num_inference_steps == 3
    drawn = read_samples(draw_samples(model, sampler, 2, tmp_path / "d", batch_size=2)).images
    steps = dict(sampler="ddim", spacing=[19, 7, 0])
    assert torch.equal(drawn, to_uint8(draw(model.unet, model.scheduler, image_generators(0, [0, 1]), **steps)))


@pytest.mark.parametrize("num_steps", [4, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_dpmsolver_is_that_of_diffusers(tmp_path, digit_folder, prediction_type, num_steps):
    model = load_pretrained(str(make_run(tmp_path / "run", digit_folder, prediction_type=prediction_type)))
    ours = draw(
        model.unet,
        model.scheduler,
        image_generators(0, [0, 1]),
        sampler="dpmsolver++",
        num_inference_steps=num_steps,
        spacing="trailing",
        clip=False,
    )
    solver = DPMSolverMultistepScheduler.from_config(
        model.scheduler.stock().config, algorithm_type="dpmsolver++", timestep_spacing="trailing"
    )
    solver.set_timesteps(num_steps)
    x = torch.cat([torch.randn(1, 1, 28, 28, generator=generator) for generator in image_generators(0, [0, 1])])
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(model.unet(x, t).sample, t, x).prev_sample
    assert (x.clamp(-1, 1) - ours).abs().max() < 2e-4
    assert ours.abs().min() < 0.9  # not all clamped away


def test_low_precision_is_inside_the_unet_only(model):
    options = dict(sampler="ddim", num_inference_steps=4, spacing="trailing")
    full = draw(model.unet, model.scheduler, image_generators(0, [0]), **options)
    low = draw(model.unet, model.scheduler, image_generators(0, [0]), dtype=torch.bfloat16, **options)
    assert low.dtype == torch.float32 and 0 < (low - full).abs().mean() < 0.05


def test_images_that_are_not_finite_are_refused(tmp_path, tiny_run, monkeypatch):
    model = load_pretrained(str(tiny_run))
    model.unet.conv_out.bias.data.fill_(float("nan"))
    sampler = Sampler(name="ddim", num_inference_steps=2).resolve(model)
    with pytest.raises(UserError, match="predicts numbers that are not finite .float32.: give"):
        draw_samples(model, sampler, 2, tmp_path / "nan", batch_size=2)
    assert not (tmp_path / "nan").exists()
    monkeypatch.setattr("ddpm_hf.sampling.sample_set.step_seconds", lambda *step: 0.0)  # as if only later steps fail
    with pytest.raises(UserError, match="image 0 has pixels that are not finite"):
        draw_samples(model, sampler, 2, tmp_path / "nan", batch_size=2)
    assert not files(tmp_path / "nan")


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--num_images 0", "must be at least 1"),
        ("--batch_size 0", "must be a whole number of at least 1"),
        ("--batch_size many", "argument --batch_size: 'many' is neither a whole number nor auto"),
        ("--dtype int8", "choose float32, bfloat16, float16 or auto"),
        ("--eta 0.5", "eta applies only to ddim"),
        ("--sampler ddim --variance_type fixed_small", "variance_type applies only to ddpm"),
        ("--num_inference_steps 21", "from 1 to the model's 20 timesteps"),
        ("--timesteps 5,9,3", "strictly rising or falling"),
        ("--timesteps sideways", "choose quad"),
        ("--class_labels 1", "this model has no classes"),
        ("--class_labels=-1", "this model has no classes"),
        ("--class_labels=,", "--class_labels is empty"),
        ("--weights raw", "has no checkpoint"),
        ("--variance_type learned_range", "predicts no variance"),
    ],
)
def test_bad_flags_are_one_sentence_and_leave_nothing(tiny_run, tmp_path, capsys, flags, wanted):
    with pytest.raises(SystemExit) as exit:
        main(["sample", str(tiny_run), "--output", str(tmp_path / "x"), "--num_images", "2", *flags.split()])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and wanted in error
    assert not files(tmp_path / "x")


@pytest.mark.parametrize("name", ["x/", "x.npz"])
def test_a_sheet_of_the_user_stays_and_our_own_is_replaced(tiny_run, tmp_path, capsys, name):
    arguments = [
        "sample",
        str(tiny_run),
        "--output",
        f"{tmp_path}/{name}",
        "--num_inference_steps=2",
        "--num_images=1",
    ]
    sheet = tmp_path / f"{name.rstrip('/')}.sheet.png"
    sheet.write_bytes(b"mine")
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "already exists, and the sheet of" in capsys.readouterr().err
    assert sheet.read_bytes() == b"mine" and [*tmp_path.iterdir()] == [sheet]
    sheet.unlink()
    main(arguments)
    first = sheet.read_bytes()
    main([*arguments, "--num_images=2"])
    assert sheet.read_bytes() != first


def test_a_record_of_millions_of_images_is_refused_at_once(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "x")
    record = json.loads((tmp_path / "x" / "samples.json").read_text())
    count = record["num_images"]
    (tmp_path / "x" / "samples.json").write_text(json.dumps(record | {"num_images": 10_000_000}))
    started = time.perf_counter()
    with pytest.raises(UserError, match=f"has only {count} of 10000000 images"):
        read_samples(tmp_path / "x")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_as_output_is_refused_or_written_through(model, tmp_path, exists):
    sampler = Sampler(num_inference_steps=2).resolve(model)
    if exists:
        draw_samples(model, sampler, 1, tmp_path / "real.npz")
    (tmp_path / "link.npz").symlink_to("real.npz")
    if not exists:
        with pytest.raises(UserError, match="--output is .*link.npz, a link to a file that does not exist"):
            draw_samples(model, sampler, 2, tmp_path / "link.npz")
        assert [path.name for path in tmp_path.iterdir()] == ["link.npz"]
        return
    draw_samples(model, sampler, 2, tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink() and len(read_samples(tmp_path / "real.npz").images) == 2


def test_what_is_no_ddpm_is_refused(tmp_path, tiny_run):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not a DDPM .it has unet: UNet2DConditionModel"):
        load_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="no model_index.json"):
        load_pretrained(str(tiny_run / "unet"))
    with pytest.raises(UserError, match="Hub"):
        load_pretrained("nobody/nothing")


def test_ctrl_c_is_one_sentence_and_what_is_drawn_stays(tiny_run, tmp_path, capsys, monkeypatch):
    batches = []

    def interrupted_at_the_third_batch(*arguments, **options):
        batches.append(arguments)
        if len(batches) == 3:  # while the second is being written
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr("ddpm_hf.sampling.settings.draw", interrupted_at_the_third_batch)
    flags = f"sample {tiny_run} --num_images 8 --batch_size 2 --num_inference_steps 2 --output {tmp_path / 'x'}"
    with pytest.raises(SystemExit) as exit:
        main(flags.split())
    assert exit.value.code == 130 and "run the same command again" in capsys.readouterr().err
    assert len(files(tmp_path / "x")) == 4


def test_a_file_that_cannot_be_written_is_a_sentence_and_leaves_nothing_half_written(tiny_run, tmp_path, capsys):
    flags = f"sample {tiny_run} --num_images 6 --batch_size 2 --num_inference_steps 2 --output {tmp_path / 'x'}"
    main(flags.replace("--num_images 6", "--num_images 2").split())
    (tmp_path / "x" / "000003.png").mkdir()
    with pytest.raises(SystemExit) as exit:
        main(flags.split())
    assert exit.value.code == 2 and "could not be written to" in (error := capsys.readouterr().err)
    assert "Is a directory" in error and "Traceback" not in error
    assert not list((tmp_path / "x").glob(".*.tmp")) and (tmp_path / "x" / "000002.png").is_file()


@pytest.mark.parametrize("has", [True, False])
def test_auto_takes_the_precision_that_the_device_is_fast_in(tiny_run, tmp_path, capsys, monkeypatch, has):
    monkeypatch.setattr("ddpm_hf.sampling.settings.has_bfloat16", lambda device: has)
    flags = f"sample {tiny_run} --sampler ddim --num_inference_steps 5 --num_images 3 --dtype auto --batch_size auto"
    main([*flags.split(), "--output", str(tmp_path / "x")])
    dtype = "bfloat16" if has else "float32"
    assert f"3 images of ddim in 5 steps in {dtype}: about a second." in capsys.readouterr().out
    assert read_samples(tmp_path / "x").sampler["dtype"] == dtype
    main([*flags.replace("auto", dtype, 1).replace("auto", "64").split(), "--output", str(tmp_path / "named")])
    assert files(tmp_path / "x") == files(tmp_path / "named")


def test_durations():
    assert [duration(s) for s in (0.2, 8, 700, 12_600)] == ["a second", "8 s", "12 min", "3.5 h"]


def test_arguments_in_python_are_read_or_refused_in_a_sentence(tiny_run, guidance_models):
    for wrong in ({"num_inference_steps": 2.5}, {"batch_size": 2.5}):
        with pytest.raises(UserError, match="whole number"):
            ddpm_hf.sample(tiny_run, 1, "ddim", **{"num_inference_steps": 2} | wrong)
    few = {"num_images": 2, "sampler": "ddim", "num_inference_steps": 2}
    by_list, by_tensor = (
        ddpm_hf.sample(guidance_models / "conditional", class_labels=labels, **few)
        for labels in ([3, 7], torch.tensor([3, 7]))
    )
    assert all(np.array_equal(one, other) for one, other in zip(by_list, by_tensor))
    classifier = guidance_models / "classifier"
    loaded, named = (
        ddpm_hf.sample(guidance_models / "plain", classifier=one, guidance_scale=5.0, **few)
        for one in (ddpm_hf.load_classifier(classifier), classifier)
    )
    assert all(np.array_equal(one, other) for one, other in zip(loaded, named))


def test_numbers_of_numpy_are_numbers(tmp_path, tiny_run):
    """samples.json holds them as it holds Python's, and other things are one sentence."""
    model = load_pretrained(tiny_run)
    steps, one = np.array([19, 7, 0]), np.int64(1)
    draw = {"sampler": "ddim", "timesteps": steps, "eta": np.float32(0.5), "seed": one, "class_labels": None}
    ddpm_hf.sample(model, one, output=tmp_path / "numpy", **draw)
    draw |= {"timesteps": steps.tolist(), "eta": 0.5, "seed": 1}
    assert ddpm_hf.sample(model, 1, output=tmp_path / "numpy", **draw) == tmp_path / "numpy"  # complete already
    for change, words in [({"eta": "0.5"}, "--eta is '0.5'"), ({"seed": 1.0}, "--seed is 1.0, but must be a whole")]:
        with pytest.raises(UserError, match=words):
            ddpm_hf.sample(model, 1, **draw | change)
    with pytest.raises(UserError, match="--num_images is 2.0, but must be a whole number"):
        ddpm_hf.sample(model, 2.0, **draw)
    with pytest.raises(UserError, match="--bound_images is '8', but must be a whole number"):
        ddpm_hf.evaluate(model, suite="smoke", bound_images="8")
