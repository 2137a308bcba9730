"""Batches are halved if memory runs out, and the results stay the same; images are written on a thread."""

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import untrained_unet
from PIL import Image
from torch import nn

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.diffusion.likelihood import bits_per_dim
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.evaluation.extractor import load_extractor
from ddpm_hf.evaluation.features import extract
from ddpm_hf.memory import in_batches
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.pictures import to_pil
from ddpm_hf.sampling.batches import batch_size_of
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.sample_set import draw_samples, read_samples
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.sampling.writer import writer_thread


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried"),
]


class Memory:
    """Holds up to `most` images: as a hook of a network it raises what a full device raises, and keeps the sizes."""

    def __init__(self, network: nn.Module, most: int, error: Exception = FULL[0]):
        self.most, self.error, self.sizes = most, error, []
        network.register_forward_pre_hook(self)

    def __call__(self, network, arguments):
        if len(arguments[0]) > self.most:
            raise self.error
        self.sizes.append(len(arguments[0]))


@pytest.fixture
def model(tiny_run):
    return load_pretrained(str(tiny_run))


@pytest.fixture
def ddim(model):
    return Sampler(name="ddim", num_inference_steps=3).resolve(model)


@pytest.fixture(scope="module")
def wanted(tiny_run):
    model = load_pretrained(str(tiny_run))
    sampler = Sampler(name="ddim", num_inference_steps=3).resolve(model)
    return sample_images(model, sampler, range(23), batch_size=4, progress=False)


def assert_equal_up_to_round_off(images, wanted):
    assert images.shape == wanted.shape and (images.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("error", FULL, ids=["a GPU", "a processor"])
def test_batches_that_do_not_fit_are_halved_and_this_is_said_once(model, ddim, wanted, tmp_path, capsys, error):
    memory = Memory(model.unet, 5, error)
    draw_samples(model, ddim, 23, tmp_path / "x", batch_size=16)
    assert_equal_up_to_round_off(read_samples(tmp_path / "x").images, wanted)
    said = capsys.readouterr().out
    assert said.startswith("16 images together did not fit into memory, so batches now have at most 4.\n23 images of")
    assert said.count("memory") == 1
    calls_to_time = 2
    steps = 3
    assert memory.sizes == [4] * calls_to_time + [4] * steps * 4 + [4] * steps + [3] * steps


def test_memory_that_is_taken_meanwhile_halves_later_batches(model, ddim, wanted, capsys):
    memory = Memory(model.unet, 8)

    def other_program(i, num_steps, *step):  # takes memory in the second batch, after its first step
        memory.most = 8 if len(memory.sizes) < 4 else 2

    images = sample_images(model, ddim, range(23), batch_size=8, on_step=other_program)
    assert_equal_up_to_round_off(images, wanted)
    assert memory.sizes == [8] * 4 + [2] * 3 * 7 + [1] * 3
    said = capsys.readouterr()
    assert said.out == "8 images together did not fit into memory, so batches now have at most 2.\n"
    assert "23/23" in said.err


def test_one_image_that_does_not_fit_is_a_sentence_and_nothing_is_written(model, ddim, tmp_path):
    Memory(model.unet, 0)
    with pytest.raises(UserError, match="^memory ran out in a batch of one image: end other programs"):
        draw_samples(model, ddim, 4, tmp_path / "x", batch_size=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_images, wanted", [(50_000, 512), (1000, 250), (10, 64)])
def test_auto_on_gpus_gives_each_process_a_batch(monkeypatch, num_images, wanted):
    gpus = SimpleNamespace(device=torch.device("cuda"), num_processes=4)
    monkeypatch.setattr("ddpm_hf.sampling.batches.PartialState", lambda: gpus)
    assert batch_size_of("auto", num_images) == wanted


def test_other_errors_pass():
    def fail(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="^shapes differ$"):
        next(in_batches(fail, [range(4)]))


def test_features_and_the_bound_are_halved_too(wanted):
    extractor, small = (load_extractor("digits") for _ in range(2))
    Memory(small, 3)
    features, halved = (extract(network, wanted[:8], batch_size=8).features for network in (extractor, small))
    torch.testing.assert_close(halved, features, rtol=0, atol=1e-5 * features.abs().max().item())

    unet, scheduler = untrained_unet(28), make_scheduler("nichol_cosine", 5)
    full = copy.deepcopy(unet)
    Memory(full, 3)
    bounds = [
        bits_per_dim(one, scheduler, wanted[:2], range(2), batch_size=10, progress=False) for one in (unet, full)
    ]
    torch.testing.assert_close(bounds[1]["bits_per_dim"], bounds[0]["bits_per_dim"], rtol=1e-5, atol=0)


def test_restorations_are_halved_too(model, wanted, tmp_path):
    photos = to_pil(wanted[:5])
    (tmp_path / "in").mkdir()
    for k, photo in enumerate(photos):
        photo.save(tmp_path / "in" / f"{k}.png")
    task = dict(task="deblur", num_inference_steps=2, num_samples=1)
    whole = ddpm_hf.restore(model, photos, **task)
    memory = Memory(model.unet, 2)
    halved = ddpm_hf.restore(model, photos, **task)
    ddpm_hf.restore(model, tmp_path / "in", tmp_path / "out", **task)
    for k in range(5):
        written = Image.open(tmp_path / "out" / f"{k}.png")
        for image in (halved[k], written):
            assert_equal_up_to_round_off(*(torch.from_numpy(np.array(one)) for one in (image, whole[k])))
    assert max(memory.sizes) == 2
    memory.most = 0
    with pytest.raises(UserError, match="^memory ran out in a batch of one image"):
        ddpm_hf.restore(model, tmp_path / "in", tmp_path / "new", **task)
    assert not (tmp_path / "new").exists()


def test_the_thread_writes_while_the_next_batch_is_drawn():
    drawn, written = threading.Event(), []
    with writer_thread() as write:
        write(lambda: written.append(drawn.wait(10)))
        drawn.set()  # the thread waits for this; it would wait in vain if `write` did not return at once
        write(written.append, "second")
        assert written[0] is True  # at most one call waits
    assert written == [True, "second"]


@pytest.mark.parametrize("more", [True, False], ids=["at the next call", "at the end"])
def test_an_error_of_the_thread_is_raised(more):
    with pytest.raises(ZeroDivisionError), writer_thread() as write:
        write(lambda: 1 / 0)
        if more:
            write(lambda: 1)
            pytest.fail("this call has to raise")
