"""The commands of `ddpm_hf`, one file each.

A command's file has a docstring, `add_flags(parser)` and `run(arguments)`. `ddpm_hf --help` shows the first line of
the docstring, and the command's own --help shows all of it. To add a command, write its file and put its name
in the list below. Import torch and other slow packages only inside `run`, so that every `--help` is quick.
"""

# `ddpm_hf --help` lists the commands in this order. The file of `push-space` is push_space.py.
COMMANDS = [
    "train",
    "presets",
    "sample",
    "evaluate",
    "compare",
    "restore",
    "figures",
    "ema",
    "export",
    "convert",
    "card",
    "push",
    "push-space",
]
