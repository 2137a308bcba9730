"""Start commands in real processes, forked from a server that has done the imports, which saves seconds each."""

import importlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "ddpm_hf.commands.train",
        "ddpm_hf.training.loop",
        "ddpm_hf.evaluation.evaluate",
        "sklearn.datasets",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "torch._dynamo",  # the first step of an optimizer imports it
    ]
)


def in_child(program, arguments, log, environment, file_size):
    """Be a process that runs `main` of a module with its output in `log`."""
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests run under nohup
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [f"{program}.py", *arguments]
    importlib.import_module(program).main(arguments)


def start(log, *arguments, program="train_unconditional", environment=(), file_size=None):
    """Start `program` with these arguments, its output at the end of file `log`; return its Process."""
    Path(log).touch()
    arguments = [str(argument) for argument in arguments]
    child = FORKSERVER.Process(target=in_child, args=(program, arguments, log, dict(environment), file_size))
    child.start()
    return child


def finish(log, *arguments, code=0, **kwargs):
    """Run a program to its end, which must have this exit code; return all that is in `log`."""
    return ended([start(log, *arguments, **kwargs)], log, code)


def rendezvous(processes):
    """Return what a launcher tells each of several processes, as environment variables, but for LOCAL_RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [place | {"WORLD_SIZE": str(processes), "RANK": str(k)} for k in range(processes)]


def start_together(log, *arguments, processes, **kwargs):
    """Start a program as several processes that know of each other; return them."""
    ranks = [rank | {"LOCAL_RANK": rank["RANK"]} for rank in rendezvous(processes)]
    return [start(log, *arguments, environment=rank, **kwargs) for rank in ranks]


def ended(children, log, code=0):
    """Wait for processes to end, each with this exit code; return what they wrote into `log`."""
    for child in children:
        child.join(240)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()  # one that still waits for another
    said = Path(log).read_text()
    assert codes == [code] * len(children), said
    return said


def launch(*program, env=()):
    """Run a program as two processes of torch's launcher, imports and all, to its end, which must be a good one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)} | dict(env)
    done = subprocess.run([*launcher, *map(str, program)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
