"""`ddpm_hf evaluate`."""

import sys


def run(arguments):
    """Evaluate, print the scores, and write the card of the run anew.

    Raises:
        SystemExit: with code 1, if a metric of --require was skipped; the record is written first.
    """
    from ..evaluation.evaluate import DATA_FLAGS, check_metrics, evaluate
    from ..processes import start_processes
    from ..sharing.card import write_card
    from .flags import sampler_settings

    start_processes()
    check_metrics(arguments.require)
    data = {name: getattr(arguments, name) for name in DATA_FLAGS if getattr(arguments, name) is not None}
    evaluated = evaluate(
        arguments.subject,
        samples=arguments.from_samples,
        calibrate=arguments.calibrate,
        metrics=arguments.metrics,
        suite=arguments.suite or "fast",
        num_images=arguments.num_images,
        bound_images=arguments.bound_images,
        bound_timesteps=arguments.bound_timesteps,
        features=arguments.features,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        sampler=arguments.sampler,
        resolution=arguments.resolution or 32,
        inception=arguments.inception,
        inception_pipeline=arguments.inception_pipeline,
        dinov2=arguments.dinov2,
        reference=arguments.reference,
        reference_pipeline=arguments.reference_pipeline,
        output=arguments.output,
        overwrite=arguments.overwrite,
        samples_dir=arguments.samples_dir,
        cache_dir=arguments.cache_dir,
        **data,
        **sampler_settings(arguments),
    )
    if evaluated is None:  # this is not the main process
        return
    print(evaluated)
    print(f"\nThe record is {evaluated.path}.")
    folder = evaluated.path.parent
    if folder.name == "evaluations" and (folder.parent / "README.md").is_file():
        write_card(folder.parent)
    measured = {name for name in evaluated.metrics if name not in evaluated.skipped}
    if missing := [name for name in arguments.require if name not in measured]:
        print(f"ddpm_hf evaluate: {', '.join(missing)} is required, but was skipped.", file=sys.stderr)
        sys.exit(1)
