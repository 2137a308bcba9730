"""Average the weights of a finished run over a length chosen after training, or find the best length (post-hoc EMA).

models/post_hoc_ema.py defines the length of an average.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, no_such
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import METRICS
from ..files import check_new_output, new_folder, write_json, writing
from ..locks import check_unlocked
from ..models.post_hoc_ema import FOLDER, end_of_average, gamma_of, reconstruct
from ..models.pretrained import Pretrained, load_pretrained, opening, weights_hash
from ..models.saving import save_pipeline
from ..pictures import save_picture
from ..run_folder import checkpoints
from .figures import BLUE, GREY, ORANGE, config_of, plot
from .run import build_run
from .validation import validation_loss


SWEEP = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
INEXACT = 0.1  # if the relative error of an average is larger, a warning is printed


def average_after_training(
    folder: str | Path,
    output: str | Path,
    *,
    lengths: list[float] | None = None,
    by: str = "validation_loss",
    num_images: int | None = None,
    step: int | None = None,
) -> dict:
    """Write a pipeline whose weight average has another length than in training, and return its facts.

    ddpm_hf/models/post_hoc_ema.py defines the length of an average. If there are several lengths, each is measured.
    The pipeline of the best length is written, with a plot ema_sweep.png beside it.

    Args:
        folder: a run with --ema_snapshots.
        output: a folder that does not exist yet.
        lengths: the lengths, as shares of the training up to `step`. None: the lengths in SWEEP.
        by: the score that decides between lengths: validation_loss, or a metric of `evaluate`.
        num_images: if `by` is a metric, how many images to draw. None: as many as `evaluate` draws.
        step: the step at which the average ends. It must have a snapshot. None: the last step with a snapshot.

    Returns:
        The facts, which are also written to ema.json: the chosen "length", the "step", "by" (None for one length) and
        "lengths", a list with a dict for each length. The dict has the "length" and the "error", the relative error of
        the average that is computed from the snapshots. The dict of a measured length also has the "value" and
        "lower_is_better".

    Raises:
        UserError: if the run has no pipeline yet or no snapshots, if a length is too small or too large, or if `by`
            cannot be measured. Nothing is written then.
    """
    output, folder, lengths = check_new_output("OUTPUT", output), Path(folder), sorted(set(lengths or SWEEP))
    for length in lengths:
        gamma_of(length)
    if by not in ("validation_loss", *METRICS):
        raise UserError(no_such("--by", by, ["validation_loss", *METRICS]))
    check_unlocked(folder, "wait until it ends")
    model = load_pretrained(folder)
    step = end_of_average(folder, step)
    measure = None
    if len(lengths) > 1:
        measure = _loss_measure(model) if by == "validation_loss" else _metric_measure(by, num_images)
    rows, best = [], None
    with writing("the pipeline", output), new_folder(output) as new:
        for length in lengths:
            with opening(folder / FOLDER, "a snapshot is damaged, so train the model again"):
                weights, error = reconstruct(folder, length, step)
                model.unet.load_state_dict(weights)
            row = {"length": length, "error": error}
            if measure is not None:
                record = new / "evaluations" / f"length_{length:g}.json"
                row["value"], row["lower_is_better"] = measure(model, record)
                print(f"length {length:<6g}  {by} {row['value']:.5g}{_note(error)}", flush=True)
            elif error > INEXACT:
                print(f"length {length:g}{_note(error)}", flush=True)
            rows.append(row)
            if best is None or cost(row) < cost(best):
                best = row
                save_pipeline(new, model.unet, model.scheduler, model.classes.names)
        facts = {"run": folder.resolve().name, "length": best["length"], "step": step, "by": None, "lengths": rows}
        if measure is not None:
            facts["by"] = by
            sweep_figure(rows, by, new / "ema_sweep.png")
        write_json(new / "ema.json", facts)
        write_json(new / "train_config.json", model.run)  # tells `evaluate` which data to compare with
    return facts


def cost(row: dict) -> float:
    """Return the value that was measured for one length, negated if higher values are better."""
    return row["value"] if row["lower_is_better"] else -row["value"]


def _note(error: float) -> str:
    """Return a warning if the relative error of an average is above INEXACT, else an empty text."""
    if error <= INEXACT:
        return ""
    return f"  (approximate, with a relative error of {error:.0%}: train with more --ema_snapshots)"


def _loss_measure(model: Pretrained):
    """Return a function that measures a model's loss on the held-out images, as during training. Lower is better."""
    config = config_of(model, eval_metrics=None, save_best=False, best_by="validation_loss", logger="none")
    found = checkpoints(model.run_folder)  # with a checkpoint, the model of --init_from is not needed
    run, _ = build_run(config, found[-1] if found else None)
    if run.validation_set is None:
        raise UserError("this run held out no images: give --by with a metric, or train with --validation_split.")

    def measure(model: Pretrained, path: Path) -> tuple[float, bool]:
        run.network.load_state_dict(model.unet.state_dict())
        sums, counts = validation_loss(run, run.network, run.loss)
        return float(sums.sum() / counts.sum()), True

    return measure


def _metric_measure(metric: str, num_images: int | None):
    """Return a function that scores a model: it returns the score, and whether lower scores are better."""

    def measure(model: Pretrained, path: Path) -> tuple[float, bool]:
        facts = model.facts | {"unet_sha256": weights_hash(model.unet.state_dict())}
        with tempfile.TemporaryDirectory() as samples:
            result = evaluate(
                replace(model, facts=facts), metrics=[metric], num_images=num_images, output=path, samples_dir=samples
            )
        if result.skipped:
            raise UserError(f"--by {metric} is not available: {next(iter(result.skipped.values()))}")
        first = result.record["metrics"][0]
        return first["value"], first["lower_is_better"]

    return measure


def sweep_figure(rows: list[dict], by: str, path: Path) -> Path:
    """Plot the measured value of each length. Mark the best length, and the lengths whose error is above INEXACT."""
    figure, axes = plot("A", [f"{by.replace('_', ' ')} of averages of the weights"], 4)
    best = min(rows, key=cost)
    marks = [("", rows, "o-", BLUE, 5), (f"best: length {best['length']:g}", [best], "o", ORANGE, 9)]
    approximate = [row for row in rows if row["error"] > INEXACT]
    marks.append(("approximate: needs more --ema_snapshots", approximate, "o", GREY, 5))
    for label, some, style, color, size in marks:
        points = [row["length"] for row in some], [row["value"] for row in some]
        axes["A"].plot(*points, style, color=color, markersize=size, label=label if some else "")
    axes["A"].set(xscale="log", xlabel="length of the average, as a share of the training (sigma_rel)")
    axes["A"].set(ylabel=by.replace("_", " "))
    axes["A"].set_xticks([row["length"] for row in rows], [f"{row['length']:g}" for row in rows])
    axes["A"].minorticks_off()
    axes["A"].legend(frameon=False)
    return save_picture(figure.savefig, path)
