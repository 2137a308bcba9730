"""`ddpm_hf evaluate`."""

import sys
import time

import torch
from accelerate import PartialState

from ..evaluation.evaluate import (
    asked_classes,
    check_shapes,
    choose_sampler,
    choose_suite,
    default_metrics,
    home,
    label,
    open_data,
    open_subject,
    record_path,
    warnings_about,
)
from ..evaluation.features import images_at
from ..evaluation.metrics import Evaluation, check_count, check_names, is_digits, open_extractors, score, skipped
from ..evaluation.records import data_name, make_record, print_record, write_record
from ..processes import start_processes
from ..randomness import keyed_generator
from ..sampling.sample_set import SampleSet, draw_samples, read_samples
from ..sharing.card import write_card
from .sample import guided


def evaluate_command(arguments):
    """Run `python -m ddpm_hf evaluate` with its parsed flags: refuse what cannot be, draw, score, print, write.

    Raises:
        UserError: for flags that do not go together, a model, samples or data that cannot be read.
        SystemExit: with code 1, if a metric of --require was skipped; the record is written first.
    """
    started = time.perf_counter()
    start_processes()
    state = PartialState()
    check_names([*(arguments.metrics or []), *arguments.require])
    model, samples = open_subject(arguments)
    train, held_out = open_data(arguments, model, samples)
    if samples is not None:
        check_shapes(samples.images, train)
    names = arguments.metrics or default_metrics(train, model)
    suite = choose_suite(arguments)
    drawer, guidance = (None, {}) if model is None else guided(model, arguments)
    sampler = samples.sampler if samples is not None else choose_sampler(arguments, drawer, suite, guidance)
    path = record_path(arguments, model, sampler, suite["num_images"])
    evaluation = Evaluation(
        images=torch.empty(0),
        train=train,
        held_out=held_out,
        model=model,
        features=arguments.features or ("digits" if is_digits(train) else "inception"),
        options={
            "inception": {"weights": arguments.inception, "pipeline": arguments.inception_pipeline},
            "dinov2": {"source": arguments.dinov2},
        },
        batch_size=arguments.batch_size,
        seed_ranges=arguments.seed_ranges,
        bound_images=suite["bound_images"] or None,
        bound_timesteps=suite["bound_timesteps"] or None,
        reference_file=arguments.reference,
        reference_pipeline=arguments.reference_pipeline,
        cache_dir=arguments.cache_dir,
        pairs_path=path.with_suffix(".pairs.png"),
        asked=asked_classes(sampler),
    )
    open_extractors(names, evaluation)
    count = suite["num_images"] * arguments.seed_ranges if samples is None else len(samples.images)
    check_count(names, evaluation, count)
    for line in warnings_about(names, evaluation, count // arguments.seed_ranges):
        state.print(line)

    if samples is None and any(name != "bits_per_dim" and not skipped(name, evaluation) for name in names):
        if arguments.calibrate:
            rows = torch.randperm(len(held_out), generator=keyed_generator(0, "floor"))[:count]
            samples = SampleSet(images_at(held_out, rows), sampler, {})
        else:
            place = arguments.samples_dir or home(model, "evaluation_samples") / label(model, sampler)
            draw_samples(drawer, sampler, count, place, arguments.batch_size)
            samples = read_samples(place)
            samples.images = samples.images[:count]
    drawn = time.perf_counter()
    if samples is not None:
        evaluation.images = samples.images
    entries = score(names, evaluation)
    if not state.is_main_process:
        return
    flags = model.run.get("flags", {}) if model is not None else {}
    record = make_record(
        evaluation,
        entries,
        model=model.facts if model is not None else (samples.model if samples is not None else {}),
        sampler=sampler,
        data_name=data_name(arguments.dataset_name or flags.get("dataset_name") or flags.get("train_data_dir")),
        cost={"drawing_s": round(drawn - started, 1), "scoring_s": round(time.perf_counter() - drawn, 1)},
    )
    print_record(record)
    write_record(record, path)
    print(f"\nThe record is {path}.")
    if path.parent.name == "evaluations" and (path.parent.parent / "README.md").is_file():
        write_card(path.parent.parent)
    if missing := [name for name in arguments.require if name not in names or skipped(name, evaluation)]:
        print(f"python -m ddpm_hf: {', '.join(missing)} is required, but was skipped.", file=sys.stderr)
        sys.exit(1)
