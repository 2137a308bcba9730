"""Score a model during training with few images. Scores are comparable, because the noise is the same each time.

Images are drawn by DDIM in 50 steps from the published weights. Their seeds begin at 1,000,000,000. `evaluate`
uses other seeds by default. With the same seeds, the model in best/ would look too good, because it was chosen by its
score on these seeds.
"""

from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from ..errors import UserError
from ..evaluation.evaluate import Evaluation, open_extractors, run_evaluation
from ..evaluation.metrics import default_features
from ..evaluation.records import by_reason, data_name, scores_of, write_record
from ..models.pretrained import Pretrained, weights_hash
from ..sampling.settings import Sampler


SEED = 1_000_000_000
# The dtype of samples for each --mixed_precision: accelerate has put this precision into the networks' forward().
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
STEPS = 50
BOUND_IMAGES = 512  # with BOUND_TIMESTEPS, enough for bits/dim to tell two checkpoints apart
BOUND_TIMESTEPS = 20


def open_evaluation(config, model: Pretrained, train_set, validation_set) -> tuple[Evaluation | None, list[str]]:
    """Return the inputs of --eval_metrics, and warnings about metrics that will be skipped.

    If --eval_metrics is not given, the inputs are None.

    Args:
        model: the model of the run, before the first step.

    Raises:
        UserError: for a metric that is impossible with these images, or if --best_by names a skipped metric.
    """
    if not config.eval_metrics:
        return None, []
    steps = min(STEPS, len(model.scheduler))
    sampler = Sampler(name="ddim", num_inference_steps=steps, seed=SEED, dtype=DTYPES[config.mixed_precision])
    evaluation = Evaluation(
        # Put the --best_by metric first, because `score_run` reads its value from the first entry.
        metrics=sorted(config.eval_metrics, key=lambda name: name != config.best_by),
        train=train_set,
        held_out=validation_set,
        data_name=data_name(config.dataset_name or config.train_data_dir),
        model=model,
        sampler=sampler.resolve(model),
        num_images=config.eval_num_images,
        features=default_features(train_set),
        options={"inception": {"weights": config.eval_inception}},
        batch_size=config.train_batch_size,
        bound_images=BOUND_IMAGES,
        bound_timesteps=min(BOUND_TIMESTEPS, len(model.scheduler)),
    )
    open_extractors(evaluation)
    reasons = {name: evaluation.why_skipped(name) for name in config.eval_metrics}
    if reasons.get(config.best_by):
        raise UserError(f"--best_by {config.best_by} is not available: {reasons[config.best_by]}")
    return evaluation, [f"Warning: {ids} will be skipped: {reason}" for ids, reason in by_reason(reasons)]


def score_run(run, on_step) -> tuple[dict[str, float], float | None]:
    """Return the scores of the published weights as `{id: value}`, and the value for --best_by, where lower is better.

    The value is None if --best_by names no metric, or a metric that failed. Every process calls this and draws its
    share of the images. The main process writes the record evaluations/step_<n>.json. The others return ({}, None).
    `on_step` is called after every step of sampling.
    """
    config, step = run.config, run.state.step
    path = Path(config.output_dir) / "evaluations" / f"step_{step:07d}.json"
    unet = run.published
    facts = run.evaluation.model.facts | {"unet_sha256": weights_hash(unet.state_dict()), "train_step": step}
    model = replace(run.evaluation.model, unet=unet, facts=facts)
    pairs = path.with_suffix(".pairs.png")
    record = run_evaluation(replace(run.evaluation, model=model, pairs_path=pairs, on_step=on_step))
    if record is None:
        return {}, None
    write_record(record, path)
    for entry in record["metrics"]:
        if entry.get("failed"):
            tqdm.write(f"Warning: the metric {entry['id']} failed at step {step} and is left out: {entry['reason']}")
    compared = None
    first = record["metrics"][0]
    if config.best_by in config.eval_metrics and "value" in first:
        compared = first["value"] if first["lower_is_better"] else -first["value"]
    return scores_of(record), compared
