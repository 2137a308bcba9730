"""Write finished images on a thread, while the network computes the next ones."""

import contextlib
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def writer_thread():
    """Yield a function `write(function, *values)`, which calls function(*values) on a thread.

    `write` first waits until the previous call is done, so at most one batch is in memory besides the new one. If the
    previous call failed, `write` raises its error. The end of the `with` block waits for the last call and raises its
    error. After an error or Ctrl-C inside the block, a call that has begun is still finished.
    """
    calls = []
    with ThreadPoolExecutor(1) as pool:

        def write(function, *values):
            finish()
            calls.append(pool.submit(function, *values))

        def finish():
            while calls:
                calls.pop().result()

        yield write
        finish()
