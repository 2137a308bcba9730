"""The commands of `ddpm_hf`, one file each.

A command's file has a docstring (its first line is shown in `ddpm_hf --help`, all of it in the command's own help),
`add_flags(parser)` and `run(arguments)`. To add one, write its file and put its name in this list. Import torch and
other slow packages inside `run` only, so that every `--help` is quick.
"""

# In the order of the listing; the file of `push-space` is push_space.py.
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
