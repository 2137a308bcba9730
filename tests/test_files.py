"""Writing files: a failed write leaves nothing, and says what to do. Errors of other libraries give no bad advice."""

import errno
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm_hf import UserError
from ddpm_hf.errors import reason_of
from ddpm_hf.files import check_output, read_json, write_beside, write_json, write_npz, writing
from ddpm_hf.run_folder import read_metrics


def fill_the_disk(partial):
    with open("/dev/full", "w") as full:
        partial.write_text("a part")
        full.write("the rest")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("before")
    with pytest.raises(UserError, match="No space left .*: free some space"), writing("a file", tmp_path):
        write_beside(tmp_path / "metrics.jsonl", fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "before"
    with pytest.raises(TypeError):
        write_json(tmp_path / "new.json", {"a": object()})
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder.npz").mkdir()
        write_npz(tmp_path / "folder.npz", a=np.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "metrics.jsonl"]


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "mine" and read_json(tmp_path / "a.json") == {"a": 1}
    assert not (tmp_path / "a.json").is_symlink()


def test_a_pipe_where_a_temporary_file_goes_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".a.json.tmp")
    reader = os.open(tmp_path / ".a.json.tmp", os.O_RDONLY | os.O_NONBLOCK)  # so that a writer would not wait here
    write_json(tmp_path / "a.json", {"a": 1})
    os.close(reader)
    assert (tmp_path / "a.json").is_file() and read_json(tmp_path / "a.json") == {"a": 1}


def test_numbers_that_no_float_can_hold_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"value": 1' + 400 * "0" + "}")
    with pytest.raises(UserError, match="a whole number of more than 40 digits"):
        read_json(tmp_path / "a.json")
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1' + 400 * "0" + "}", '{"step": 3, "loss": 0.1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space or allow writing"),
        (errno.EACCES, "free some space or allow writing"),
        (errno.ENOTDIR, "give another path"),
        (errno.ENAMETOOLONG, "give another path"),
        (errno.ENOTEMPTY, "remove what is there, or give another path"),
    ],
)
def test_the_advice_suits_the_reason(number, advice):
    with pytest.raises(UserError) as caught, writing("the run", "runs/x"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).endswith(f"({os.strerror(number)}): {advice}.".replace("(", f"([Errno {number}] ", 1))


def test_a_link_to_nothing_is_no_output(tmp_path):
    (tmp_path / "there.npz").write_bytes(b"")
    for target in ("there.npz", "missing.npz"):
        (tmp_path / f"to_{target}").symlink_to(tmp_path / target)
    assert check_output("--output", tmp_path / "to_there.npz").name == "to_there.npz"
    with pytest.raises(UserError, match=r"a link to a file that does not exist: remove the link"):
        check_output("--output", tmp_path / "to_missing.npz")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "script"])
def test_no_message_advises_to_unpickle_unsafely(tmp_path, kind, capsys):
    path = tmp_path / "weights.bin"
    if kind == "script":
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), str(path))
    elif kind == "zip":
        torch.save({"a": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(Exception, match="weights_only") as caught:  # torch advises it
        torch.load(path, weights_only=True)
    assert reason_of(caught.value) == "it is damaged, or holds other things than tensors and numbers"
    assert "must not run" not in capsys.readouterr().out


def test_other_reasons_are_one_line():
    assert reason_of(ValueError("first\nsecond  word")) == "first"
    assert reason_of(ValueError("first\nsecond  word"), lines=2) == "first second word"
    assert reason_of(KeyError()) == "KeyError"


def test_ctrl_c_while_the_flags_are_read_is_one_word():
    code = """
import signal, sys, ddpm_hf.__main__

class PressCtrlC:
    def find_spec(self, name, *_):
        if name == "transformers":  # the flags of `train` import it, which takes long
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, PressCtrlC())
ddpm_hf.__main__.main(["train", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "\nStopped.\n" and done.stdout == ""
