"""Scores while a run trains: a small fixed budget, from the same noise each time, so that they compare.

DDIM in 50 steps from the published weights, seeds from 1,000,000,000 on, which no report of a finished model uses: a
checkpoint chosen by its luck on some noises must not be praised for them.
"""

import time
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ..errors import UserError
from ..evaluation.metrics import Evaluation, is_digits, open_extractors, score, skipped
from ..evaluation.records import by_reason, data_name, make_record, write_record
from ..models.pretrained import Pretrained, weights_hash
from ..sampling.generate import sample_images


SEED = 1_000_000_000
# The networks of a run, the average too, have its mixed precision in their forward().
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
STEPS = 50
BOUND_IMAGES, BOUND_TIMESTEPS = 512, 20  # of bits/dim: enough to tell two checkpoints apart


def open_evaluation(config, unet, scheduler, train_set, validation_set) -> tuple[Evaluation | None, list[str]]:
    """Return what --eval_metrics are computed from, or None without any, and sentences about those to be skipped.

    Raises:
        UserError: for a metric that cannot be of these images, or if it is --best_by and its weights cannot be had.
    """
    if not config.eval_metrics:
        return None, []
    evaluation = Evaluation(
        images=torch.empty(0),
        train=train_set,
        held_out=validation_set,
        model=Pretrained(unet, scheduler, {}, {}, Path(config.output_dir)),
        features="digits" if is_digits(train_set) else "inception",
        options={"inception": {"weights": config.eval_inception}},
        batch_size=config.train_batch_size,
        asked=train_set.class_names if config.class_conditional else None,
        bound_images=BOUND_IMAGES,
        bound_timesteps=min(BOUND_TIMESTEPS, len(scheduler)),
    )
    open_extractors(config.eval_metrics, evaluation)
    reasons = {name: skipped(name, evaluation) for name in config.eval_metrics}
    if reasons.get(config.best_by):
        raise UserError(f"--best_by {config.best_by} cannot be had: {reasons[config.best_by]}")
    return evaluation, [f"Warning: {ids} will be skipped: {reason}" for ids, reason in by_reason(reasons)]


def score_run(run, on_step) -> tuple[dict[str, float], float | None]:
    """Return the scores of the published weights by their ids, and what --best_by compares, lower is better.

    Every process calls this and draws its share; the main process has the numbers and writes the record,
    evaluations/step_<n>.json, and the others have ({}, None). `on_step` is called after every step of sampling.
    """
    config, accelerator, evaluation = run.config, run.accelerator, run.evaluation
    started, count = time.perf_counter(), config.eval_num_images
    steps = min(STEPS, len(run.scheduler))
    sampler = dict(method="ddim", num_inference_steps=steps)
    share = range(accelerator.process_index, count, accelerator.num_processes)
    main = accelerator.is_main_process
    images = sample_images(
        run.published,
        run.scheduler,
        SEED,
        share,
        config.train_batch_size,
        spacing="trailing",
        class_labels=run.class_labels(share),
        on_step=on_step,
        progress=main,
        **sampler,
    )
    drawn = sorted(gather_object(list(zip(share, images.numpy()))), key=lambda pair: pair[0])
    evaluation.images = torch.stack([torch.from_numpy(image) for _, image in drawn])
    evaluation.generated.clear()
    evaluation.model.unet = run.published
    path = Path(config.output_dir) / "evaluations" / f"step_{run.state.step:07d}.json"
    evaluation.pairs_path = path.with_suffix(".pairs.png")
    drawing = time.perf_counter() - started
    # What is compared goes first, so that its number is the first.
    names = sorted(config.eval_metrics, key=lambda name: name != config.best_by)
    entries = score(names, evaluation)
    if not main:
        return {}, None
    record = make_record(
        evaluation,
        entries,
        model={
            "name": Path(config.output_dir).resolve().name,
            "revision": None,
            "weights": "published",
            "unet_sha256": weights_hash(run.published),
            "parameters": run.facts["parameters"],
            "train_step": run.state.step,
            "commit": run.facts["git_commit"],
        },
        sampler=sampler
        | {"timesteps": "trailing", "eta": 0.0, "dtype": DTYPES[config.mixed_precision], "seed": SEED}
        | ({"class_names": evaluation.asked} if evaluation.asked else {}),
        data_name=data_name(config.dataset_name or config.train_data_dir),
        cost={"drawing_s": round(drawing, 1), "scoring_s": round(time.perf_counter() - started - drawing, 1)},
    )
    write_record(record, path)
    compared = None
    if config.best_by in config.eval_metrics:
        compared = entries[0]["value"] if entries[0]["lower_is_better"] else -entries[0]["value"]
    return {entry["id"]: entry["value"] for entry in entries if "value" in entry}, compared
