"""The Space's server does not wait for ever for a request that never arrives."""

import asyncio
import socket
import sys
import threading
import time

import pytest
import uvicorn
from conftest import ROOT
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route


sys.path.insert(0, str(ROOT / "spaces"))
from connections import bounded_body, close_half_sent


async def hello(request):
    return PlainTextResponse("hello")


async def slow(request):
    async def words():
        for _ in range(20):
            yield "word "
            await asyncio.sleep(0.1)

    return StreamingResponse(words())


@pytest.fixture(scope="module")
def address():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = Starlette(routes=[Route("/", hello), Route("/slow", slow)])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        close_half_sent(server, seconds=0.2)
        yield listening.getsockname()
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHo"],
    ids=["nothing", "half a head", "half a second head"],
)
def test_a_half_sent_request_is_closed(address, sent):
    with socket.create_connection(address, timeout=4) as connection:  # uvicorn closes idle connections after 5 s
        connection.sendall(sent)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass


def test_an_answer_that_takes_long_is_not_cut(address):
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.count(b"word ") == 20


def messages(*given):
    """Return an ASGI `receive` that gives these messages, and then nothing."""
    left = [*given]

    async def receive():
        if not left:
            await asyncio.sleep(3600)
        return left.pop(0)

    return receive


@pytest.mark.parametrize(
    "parts, kinds",
    [
        ([(b"a", True)], ["http.request", "http.disconnect"]),
        ([(b"a", True), (b"b", False)], ["http.request", "http.request"]),
        ([(b"a" * 11, False)], ["http.disconnect"]),
        ([(b"a" * 6, True), (b"a" * 6, True)], ["http.request", "http.disconnect"]),
    ],
)
def test_a_body_that_is_too_long_or_too_late_is_a_disconnect(parts, kinds):
    async def received():
        sent = [{"type": "http.request", "body": body, "more_body": more} for body, more in parts]
        receive = bounded_body(messages(*sent), 10, seconds=0.2)
        found = [(await receive())["type"] for _ in kinds]
        if parts[-1] == (b"b", False):  # the body is whole, so this waits for the visitor to go
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.5)
        return found

    assert asyncio.run(received()) == kinds
