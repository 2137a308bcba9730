"""Define how commands print: text that cannot be printed is dropped, so that a closed output does not end the work."""

import contextlib
import os
import sys


PASSING_BAR = {"leave": False, "delay": 2}  # a tqdm bar that appears after 2 s and vanishes at the end


class LossyStream:
    """A text stream that drops text that it cannot write. It passes everything else to the stream that it wraps."""

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a notebook's stream has no `reconfigure`
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text` and return its length. If the stream is closed or full, or cannot encode `text`, drop it."""
        # A closed stream and a failed encoding raise ValueError.
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def writelines(self, lines):
        """Write each of `lines`, as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self):
        """Flush the stream, if it can be flushed. Python calls this at its exit as well."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def drop_failing_output():
    """Replace sys.stdout and sys.stderr for the life of this process, so that printing never raises.

    For example, Ctrl-C in `train | tee log` ends `tee`, so nothing reads the output any more. Or the disk with the log
    is full. Without this function, printing would then end hours of work.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started with this output closed, and tqdm writes to it nevertheless
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open)
        if not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))
