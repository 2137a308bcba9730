"""Batches are drawn ahead by a thread, with the same numbers, and a step never waits for a result."""

import contextlib
import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from torch.overrides import TorchFunctionMode

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.batches import training_batches
from ddpm_hf.diffusion.losses import draw_noise, training_labels
from ddpm_hf.diffusion.timestep_sampling import HISTORY, draw_uniform, new_history, update_history
from ddpm_hf.training.batches_ahead import AHEAD, draw_batches, prepare_thread
from ddpm_hf.training.loop import step
from ddpm_hf.training.run import make_optimizer, open_run


# Together these flags reach every line of a step.
ALL = ["--class_conditional", "--use_ema", "--gradient_accumulation_steps=2", "--dropout=0.1", "--snr_gamma=5"]
ALL += ["--timestep_sampling=loss_second_moment", "--prediction_type=v_prediction", "--ema_snapshots=2"]


def open_tiny(folder, *flags):
    return open_run(parse_config([*TINY, f"--output_dir={folder}", "--overwrite_output_dir", *flags]))


def test_the_thread_starts_for_a_single_gpu_whose_device_has_no_index():
    with ThreadPoolExecutor(1, initializer=prepare_thread, initargs=(torch.device("cuda"),)) as thread:
        assert thread.submit(torch.get_num_threads).result() == 1


# The numbers.


@pytest.mark.parametrize("flags", [ALL, ["--streaming", "--max_train_steps=9"]], ids=["set", "stream"])
def test_a_batch_is_whole_and_has_the_numbers_of_its_ordinals(tmp_path, flags):
    run, other = open_tiny(tmp_path / "run", *flags), open_tiny(tmp_path / "other", *flags)
    config = run.config
    plain = training_batches(other.train_set, config, 0, 0, 1)
    before = torch.get_rng_state()
    with contextlib.closing(draw_batches(run)) as batches:
        for k, (batch, expected) in enumerate(itertools.islice(zip(batches, plain), 5)):
            ordinals = torch.arange(8 * k, 8 * k + 8)
            noise, timesteps = draw_noise(ordinals, (1, 8, 8), 10, seed=0)
            wanted = {"ordinals": ordinals, "images": expected["images"], "labels": expected["labels"]}
            wanted |= {"noise": noise, "timesteps": timesteps}
            if config.class_conditional:
                wanted["class_labels"] = training_labels(expected["labels"], ordinals, 10, 0.1, seed=0)
                assert torch.equal(batch.uniform, draw_uniform(ordinals, seed=0))
            assert batch.tensors.keys() == wanted.keys() and batch.dropout_seed == 8 * k
            assert all(torch.equal(batch.tensors[name], wanted[name]) for name in wanted)
            # The stream's position is that after this batch, although the thread is already further.
            assert batch.stream == expected.get("position") and (batch.stream is None) == (not config.streaming)
    assert torch.equal(before, torch.get_rng_state())


def test_the_history_of_losses_is_that_of_adding_them_one_by_one():
    generator = torch.Generator().manual_seed(0)
    history, expected = new_history(4), new_history(4)
    for count in (5, 30, 1, 12):
        ordinals = torch.randperm(count, generator=generator)
        timesteps = torch.randint(4, (count,), generator=generator)
        losses = torch.rand(count, generator=generator)
        update_history(history, ordinals, timesteps, losses)
        for row in ordinals.argsort().tolist():
            t = timesteps[row]
            expected[t] = torch.cat([expected[t], losses[row, None].double()])[-HISTORY:]
        assert torch.equal(history.nan_to_num(-1), expected.nan_to_num(-1))


# The thread.


def test_the_thread_draws_ahead_leaves_the_cores_to_the_step_and_ends(tmp_path):
    drawn, run = [], open_tiny(tmp_path)

    class Watched(type(run.train_set)):
        def get(self, *arguments, **options):
            drawn.append((threading.current_thread().name, torch.get_num_threads()))
            return super().get(*arguments, **options)

    run.train_set.__class__ = Watched
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.closing(draw_batches(run)) as batches:
            for _ in range(3):
                next(batches)
            later = []
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        torch.set_num_threads(threads)
    assert 3 <= len(drawn) <= 3 + AHEAD and set(drawn) == {("batches_0", 1)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_is_raised_when_its_batch_is_due_and_not_before(tmp_path):
    run = open_tiny(tmp_path)
    get, calls = run.train_set.get, itertools.count()

    def broken(*arguments, **options):
        if next(calls) == 2:
            raise UserError("image 16 cannot be read.")
        return get(*arguments, **options)

    run.train_set.get = broken
    batches = draw_batches(run)
    assert [next(batches).tensors["ordinals"][0] for _ in range(2)] == [0, 8]
    with pytest.raises(UserError, match="^image 16 cannot be read.$"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


# No blocking call.

READS = {
    "item": lambda losses: losses.mean().item(),
    "float": lambda losses: float(losses.mean()),
    "an if": lambda losses: 1 if losses.isnan().any() else 0,
    "cpu": lambda losses: losses.cpu(),
    "to": lambda losses: losses.to("cpu", non_blocking=True),
    "tolist": lambda losses: losses.tolist(),
    "numpy": lambda losses: losses.detach().numpy(),
    "a mask": lambda losses: losses[losses > 1],
    "nonzero": lambda losses: losses.nonzero(),
    "a number to the device": lambda losses: torch.tensor(0.5, device=losses.device),
    "a copy to the device": lambda losses: torch.zeros(3).to(losses.device),
}


class Copies(TorchFunctionMode):
    """Refuses copies from the host to the device that the host waits for."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        name = getattr(function, "__name__", "")
        from_host = name in ("to", "tensor", "as_tensor") and not getattr(arguments[0], "is_meta", False)
        if from_host and torch.is_tensor(result) and result.is_meta and not options.get("non_blocking"):
            raise NotImplementedError(f"the host waits for torch.{name}")
        return result


def on_meta(run, monkeypatch):
    """Return the run with all that a GPU would hold on torch's device "meta".

    Tensors there have no numbers, so an error comes from every line that reads one on the host. Tensors of the host
    can be read as usual. That is what must not, and what may, be read during a step on a GPU.
    """
    meta = torch.device("meta")
    monkeypatch.setattr(Accelerator, "device", property(lambda self: meta))
    run.network.to(meta)
    for average in (run.ema, *run.power_averages.values()):
        average.to(meta)
    run.state.loss_history = run.state.loss_history.to(meta)
    optimizer = run.accelerator.prepare_optimizer(make_optimizer(run.config, run.network, meta))
    return dataclasses.replace(run, optimizer=optimizer)


def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch):
    run = on_meta(open_tiny(tmp_path, *ALL), monkeypatch)
    with contextlib.closing(draw_batches(run)) as batches, contextlib.ExitStack() as guard:
        step(run, batches)  # the first step copies a table to the device
        guard.enter_context(Copies())
        step(run, batches)
        assert run.state.step == 2 and all(row.is_meta for row in run.state.pending)
        # The test above would notice each of these.
        for name, read in READS.items():

            def loss(model, batch, read=read):
                read(batch["noise"][:, 0, 0, 0])
                return run.loss(model, batch)

            with pytest.raises((NotImplementedError, RuntimeError, TypeError), match="meta|waits"):
                step(dataclasses.replace(run, loss=loss), batches)
                pytest.fail(f"{name} was not noticed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    run = open_tiny(tmp_path, *ALL, "--mixed_precision=bf16")
    with contextlib.closing(draw_batches(run)) as batches:
        step(run, batches)  # the first step copies tables, and allocates the moments of AdamW
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step(run, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
