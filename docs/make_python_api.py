"""Write docs/python_api.md from the docstrings of the public names: `python docs/make_python_api.py`."""

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import ddpm_hf


PAGE = Path(__file__).with_name("python_api.md")
TITLES = {
    "Train": ["TrainingConfig", "PRESETS", "Preset", "train", "FinishedRun"],
    "Load and sample": ["load", "load_classifier", "sample", "Sampler", "Classes", "guide"],
    "Score and restore": ["evaluate", "Evaluated", "compare", "restore", "Restored"],
    "Share": ["export", "push"],
    "Mathematics": ["PaperDDPMScheduler"],
    "Tables to add to": ["SAMPLERS", "Step", "METRICS", "Metric", "Look", "OBJECTIVES", "BETA_SCHEDULES"],
    "Errors": ["UserError"],
}
# The texts for the public dicts, because a dict has no docstring.
TABLES = {
    "PRESETS": "The recipes: name -> `Preset(about, flags)`. `TrainingConfig.from_preset(name)` and `--preset` read "
    "this table. Add an entry to define your own preset.",
    "SAMPLERS": "Name -> `function(scheduler, step, *, settings)` that returns a tuple: the mean of the next image "
    "and its standard deviation (None: no noise is drawn). `ddpm_hf/sampling/samplers.py` has ddpm, ddim "
    "and dpmsolver++. `sample`, `evaluate` and `Sampler.own_settings` give a function its "
    "keyword-only arguments, and the records hold them, with a hash of the file that defines the function.",
    "METRICS": "Name -> `Metric`. `evaluate(metrics=[name])` and `--metrics name` use this table.",
    "OBJECTIVES": "Name -> `function(scheduler, *, loss_type, snr_gamma)` that returns a loss. `loss(model, batch)` "
    "gives one number per image. See `ddpm_hf/diffusion/losses.py`.",
    "BETA_SCHEDULES": "Name -> `function(T, **config)` that returns a `PaperDDPMScheduler` with T timesteps. "
    "`--ddpm_beta_schedule` takes these names. For betas of your own, return "
    "`PaperDDPMScheduler(num_train_timesteps=T, trained_betas=[...], **config)`: stock diffusers reads them too.",
}
INTRODUCTION = """# ddpm_hf in Python

Everything that the commands do can also be called from Python, in a script or in a notebook. (`push-space` is the
exception: it is only a command.)
`python docs/make_python_api.py` makes this page from the docstrings, and the tests run the examples.

```python
from diffusers.utils import make_image_grid

import ddpm_hf

# Train: take a preset and change some flags. `digits` needs no network and takes three minutes on a CPU.
config = ddpm_hf.TrainingConfig.from_preset("digits", output_dir="runs/digits")
run = ddpm_hf.train(config)
print(run.losses["loss"], run.folder)

# Draw: image k is always the same image, however many images are drawn.
images = ddpm_hf.sample(run.folder, 16, "ddim", num_inference_steps=50, seed=0)
images[0].save("digit.png")
make_image_grid(images, 4, 4).resize((256, 256)).save("digits.png")

# Score: a table, and a JSON record that says how each number was measured.
result = ddpm_hf.evaluate(run.folder, metrics=["bits_per_dim", "memorization"], suite="smoke")
print(result)
print(result.scores["bits_per_dim"])
print(ddpm_hf.compare(result))  # with several results, one column each

# Restore: remove noise or blur, fill holes, add pixels or colours.
clean = ddpm_hf.restore(run.folder, images, task="denoise")

# Anybody can load the model with stock diffusers alone, without ddpm_hf.
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(run.folder)
```

To train for a shorter time, give `num_epochs=10, base_channels=16` to `from_preset`. `ddpm_num_inference_steps` and
`eval_batch_size` change only the pictures that a run draws. In a notebook, `overwrite_output_dir=True` lets you run
the cell again. The loss curve is `figures/loss.png` in `run.folder`; `metrics.jsonl` has one line for every 10 steps.

A mistake raises a `ddpm_hf.UserError`, a `ValueError` of one sentence. It names an argument as the flag of the command
line: `--seed` is `seed=`.

The metrics `bits_per_dim` and `memorization` need no download, nor does `fd_mnist` for MNIST. The others are `fid`,
`kid`, `precision_recall`, `inception_score` and `fd_dinov2`. `result.scores` holds the numbers under the names in the
table. `result.skipped` says which metrics were skipped, and why. For distances, bits/dim and class balance, lower is
better. Compare a score with its floor, which is the value of real images, and with records of the same settings, which
is what `compare` checks. Bits/dim has no floor: compare it with other models of the same data. The finished `digits`
preset has 5.0 (`suite="smoke"`). `memorization` does not say how good
the images are, only whether they are copies of training images. [scores.md](scores.md) explains all scores.

For a model with classes, train with `class_conditional=True`. Then ask for a class, and for how closely to follow it:

```text
ddpm_hf.sample("runs/mnist-conditional", 16, "ddim", class_labels=7, guidance_scale=2)
```

`restore` takes PIL images, arrays (N, H, W, C) and tensors (N, C, H, W), as uint8 or with values in [0, 1]. Wherever
a model is wanted, you can give a finished run, its folder, or a name with a slash, such as `me/ddpm-mnist`, which is a
Hub id. Bad input raises `ddpm_hf.UserError`, a `ValueError` whose message is one sentence. Progress bars work in
notebooks. Ctrl-C during training writes a checkpoint and returns the run so far, with `finished=False`. To continue
exactly from there, train again with the same config, without `overwrite_output_dir`, and with
`resume_from_checkpoint="latest"`. A run also writes a checkpoint at its end. To train a finished run for longer, raise
`max_train_steps` or `num_epochs` and resume. The learning rate's schedule is then stretched, and a warning says by how
much the rate jumps.
"""


def render(docstring: str) -> str:
    """Return a docstring as Markdown. Sections become headings, arguments become a list, the example a code block."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    lines = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2]):
        body = textwrap.dedent(body).strip()
        if title == "Example":
            lines.append(f"```pycon\n{body}\n```")
            continue
        items = [body] if title == "Returns" else re.split(r"\n(?! )", body)
        items = [re.sub(r"^([\w, ]+): ", r"**\1**: ", " ".join(item.split())) for item in items]
        lines.append(f"*{title.replace('Args', 'Arguments')}*\n\n" + "\n".join(f"- {item}" for item in items))
    return "\n\n".join(lines)


def methods(value) -> list[tuple[str, object]]:
    """Return (name, function) for each public method with a docstring that a class itself defines."""
    found = vars(value).items() if inspect.isclass(value) else []
    found = [(name, getattr(each, "__func__", each)) for name, each in found if not name.startswith("_")]
    return [(name, each) for name, each in found if inspect.isfunction(each) and each.__doc__]


def signature(name: str, value) -> str:
    """Return the signature without annotations: on one line, or with one argument per line if it is long."""
    arguments = [str(each.replace(annotation=each.empty)) for each in inspect.signature(value).parameters.values()]
    arguments = [argument.replace("'", '"') for argument in arguments]
    kinds = [each.kind for each in inspect.signature(value).parameters.values()]
    star = next((k for k, kind in enumerate(kinds) if kind == inspect.Parameter.KEYWORD_ONLY), None)
    if star is not None and inspect.Parameter.VAR_POSITIONAL not in kinds:
        arguments.insert(star, "*")
    line = f"{name}({', '.join(arguments)})"
    return line if len(line) < 100 else f"{name}(\n    " + ",\n    ".join(arguments) + ",\n)"


def fields() -> str:
    """Return a table of the fields of TrainingConfig: the flags of `ddpm_hf train`."""
    lines = ["Every field is also a flag of `ddpm_hf train`. diffusers' example script lacks those marked [added]."]
    lines += ["A preset overrides these defaults. `config.learning_rate` and so on are the values that the run uses."]
    lines += ["", "| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(ddpm_hf.TrainingConfig):
        meaning = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {meaning} |")
    return "\n".join(lines)


def section(name: str) -> str:
    """Return the part of the page about one public name."""
    value = getattr(ddpm_hf, name)
    if name in TABLES:
        return f"### `{name}`\n\n{TABLES[name]}"
    text = render(value.__doc__)
    if name == "TrainingConfig":
        text += f"\n\n{fields()}"
    call = f"```text\nddpm_hf.{signature(name, value)}\n```\n\n" if not inspect.isclass(value) else ""
    parts = [f"### `{name}`\n\n{call}{text}"]
    for method, function in methods(value):
        parts.append(f"#### `{name}.{method}`\n\n{render(function.__doc__)}")
    return "\n\n".join(parts)


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION.rstrip()]
    for title, names in TITLES.items():
        parts += [f"## {title}", *map(section, names)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
