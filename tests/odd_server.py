"""A server on 127.0.0.1 that answers nothing, slowly, or nonsense."""

import contextlib
import socket
import threading
import time


class OddServer:
    """A server that answers every request in the same way, and is not the Hub."""

    def __init__(self, answer: bytes, pause: float | None = None):
        self.answer, self.pause = answer, pause
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=self.reply, args=[self.socket.accept()[0]], daemon=True).start()

    def reply(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            if self.pause is None:
                connection.sendall(self.answer)
                return
            for byte in self.answer * 1000 if self.answer else [0] * 1000:
                time.sleep(self.pause)
                connection.sendall(bytes([byte]) if self.answer else b"")
