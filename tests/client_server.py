"""Be a process that has done the imports, and fork one for each script that a client of the Hub runs.

The libraries read the address and the cache of the Hub when they are imported, so all scripts share both.
"""

import json
import multiprocessing
import os
import sys

import datasets  # noqa: F401
import diffusers.pipelines  # noqa: F401

import ddpm_hf.__main__
import ddpm_hf.sharing.push
import ddpm_hf.sharing.space
import ddpm_hf.training.loop  # noqa: F401


def run(script, token, output):
    """Run a script as a program, with what it prints in the files output.0 and output.1."""
    for k in (1, 2):
        os.dup2(os.open(f"{output}.{k}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), k)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    for line in sys.stdin:
        child = multiprocessing.get_context("fork").Process(target=run, args=json.loads(line))
        child.start()
        child.join()
        print(child.exitcode, flush=True)
