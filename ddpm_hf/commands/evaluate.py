"""Score a model, or samples, against real images and write a record.

The record is JSON that says how each number was measured, so that `ddpm_hf compare` can refuse unlike ones.

ddpm_hf evaluate runs/mnist                                  # the metrics that suit the data; 2,000 images, DDIM-50
ddpm_hf evaluate me/ddpm-cifar10 --suite paper --metrics fid,kid,bits_per_dim     # 50,000 images, all steps
ddpm_hf evaluate samples/mnist --dataset_name ylecun/mnist --validation_split test     # from the images alone
"""

import sys
import time

from .flags import add_sampler_flags, names


SUITES = ["smoke", "fast", "standard", "paper"]
PIPELINES = ["tf1", "antialias", "pytorch"]


def add_flags(parser):
    # Imported only here, because it takes a third of a second, too long for `ddpm_hf --help`.
    from ..config.training_config import METRICS

    parser.add_argument(
        "subject",
        nargs="?",
        help="a model (folder, checkpoint, Hub id), or samples: PNG files, or an .npz (arr_0: uint8 NHWC)",
    )
    parser.add_argument(
        "--from_samples", "--from-samples", metavar="FOLDER|NPZ", help="score these images of the model"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="score held-out images against train: no model at all"
    )
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    add("--metrics", type=names, help=f"of {','.join(METRICS)}; default: those that suit the data")
    add(
        "--suite",
        choices=SUITES,
        help="smoke: 256 images, 10 steps of DDIM; fast: 2,000 of DDIM-50; standard: 10,000 of "
        "DDIM-50; paper: 50,000 of all T steps, the whole bound on all held-out images; default: fast",
    )
    add("--num_images", type=int, help="generated images per seed range; default: the suite's")
    add("--seed_ranges", type=int, default=1, help="score so many successive sets of seeds; mean, deviation, min")
    add(
        "--features",
        choices=["inception", "dinov2", "digits"],
        help="that kid and precision_recall look through; default: digits for grey digits, else inception",
    )
    add("--bound_images", type=int, help="images of bits_per_dim; 0: all held-out ones; default: the suite's")
    add(
        "--bound_timesteps",
        type=int,
        help="of the bound, per image, drawn by importance; 0: all T; default: the suite's",
    )
    add("--require", type=names, default=[], help="metrics that must not be skipped: exit code 1 if one is")
    group = parser.add_argument_group("real images", "Default: those of the run's train_config.json.")
    add = group.add_argument
    for flag, text in [
        ("dataset_name", "Hub id, or local folder in the Hub's layout or of images"),
        ("dataset_config_name", "configuration of the dataset, if it has several"),
        ("image_column", "column of the images"),
        ("label_column", "column of the classes"),
        ("validation_split", "held-out images: a split's name, a count or a share, as in training"),
    ]:
        add(f"--{flag}", help=text)
    add("--class_names", type=names, help="keep only these classes")
    add("--resolution", type=int, help="of --calibrate, in pixels; else the model's or the samples'; default: 32")
    add("--reference", metavar="NPZ", help="statistics (mu, sigma) to take for FID, e.g. EDM's or pytorch-fid's")
    add("--reference_pipeline", choices=PIPELINES, help="that such a file was made with, if it does not say so")
    group = parser.add_argument_group("networks that look at images")
    add = group.add_argument
    add(
        "--inception", metavar="FILE", help="weights of FID's Inception; default: pytorch-fid's, from its release page"
    )
    add(
        "--inception_pipeline",
        choices=PIPELINES,
        default="tf1",
        help="resize and scale: tf1 (default; TTUR, EDM, "
        "torch-fidelity), pytorch (pytorch-fid) or antialias (torchmetrics from 1.8)",
    )
    add("--dinov2", metavar="FOLDER|ID", default="facebook/dinov2-large", help="default: facebook/dinov2-large")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output", metavar="JSON", help="the record; default: evaluations/... in the run's folder, or here")
    add("--overwrite", action="store_true", help="replace the record that is in --output")
    add(
        "--samples_dir",
        help="where the images are drawn to; default: evaluation_samples/... in the run's folder, or here",
    )
    add("--cache_dir", help="where features of real images are kept; default: ddpm_hf in HuggingFace's cache")
    add_sampler_flags(parser, "the suite's", "the suite's; of another sampler all T for ddpm, else 50")


def run(arguments):
    """Refuse what cannot be, draw, score, print, write.

    Raises:
        UserError: for flags that do not go together, a model, samples or data that cannot be read.
        SystemExit: with code 1, if a metric of --require was skipped; the record is written first.
    """
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
