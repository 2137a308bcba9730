"""The commands of `ddpm_hf`, one file each.

A command's file has a docstring, `add_flags(parser)` and `run(arguments)`. The first line of the docstring is shown in
`ddpm_hf --help`, and all of it in the command's own help. To add a command, write its file and put its name in this
list. Import torch and other slow packages only inside `run`, so that every `--help` is quick.
"""

# `ddpm_hf --help` lists them in this order. The file of `push-space` is push_space.py.
COMMANDS = [
    "train",
    "presets",
    "sample",
    "evaluate",
    "compare",
    "restore",
    "figures",
    "export",
    "card",
    "push",
    "push-space",
]
