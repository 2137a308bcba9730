"""Time per image of our training loop over that of a bare forward-backward-step of the same UNet, in one run.

    python benchmarks/training_loop.py --preset mnist --dataset_name FOLDER

takes every flag of train_unconditional.py. Blocks of steps alternate, so that both meet the same machine; the ratio
of the medians is the result, the seconds are only how it came about.
"""

import statistics
import sys
import tempfile
import time

import torch

from ddpm_hf.command_line import parse_config
from ddpm_hf.data import training_batches
from ddpm_hf.milestones import reach, what_is_due
from ddpm_hf.model import build_unet
from ddpm_hf.run import open_run
from ddpm_hf.training import progress_bar, step


BLOCKS, STEPS = 9, 10


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config([*sys.argv[1:], "--output_dir", folder, "--overwrite_output_dir", "--logger", "none"])
        config.checkpointing_steps = BLOCKS * STEPS + 1  # a matter of the disk, not of the loop
        run = open_run(config)
        batches = training_batches(run.train_set, config, 0, 0, 1)
        device = run.accelerator.device

        bare = build_unet(config, run.train_set.channels).to(device)
        optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4)
        images = torch.randn(config.train_batch_size, *next(batches)["images"].shape[1:], device=device)
        timesteps = torch.randint(config.ddpm_num_steps, (len(images),), device=device)

        def bare_step():
            with run.accelerator.autocast():
                output = bare(images, timesteps).sample
            torch.nn.functional.mse_loss(output.float(), images).backward()
            optimizer.step()
            optimizer.zero_grad()

        with progress_bar(run) as bar:

            def our_step():
                step(run, batches)
                bar.update()
                if due := what_is_due(run):
                    reach(run, due, 0.0, [])

            run.model.train()
            our_step()
            bare_step()
            times = {our_step: [], bare_step: []}
            for _ in range(BLOCKS):
                for one_step, seconds in times.items():
                    start = time.perf_counter()
                    for _ in range(STEPS):
                        one_step()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append((time.perf_counter() - start) / STEPS / config.train_batch_size)
    ours, theirs = (statistics.median(seconds) for seconds in times.values())
    spread = [mine / other for mine, other in zip(*times.values())]
    print(f"our loop   {ours * 1e3:.3f} ms/image\nbare step  {theirs * 1e3:.3f} ms/image")
    print(f"ratio      {ours / theirs:.3f}  (blocks from {min(spread):.3f} to {max(spread):.3f})")


if __name__ == "__main__":
    main()
