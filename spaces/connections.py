"""Close connections whose request does not arrive: uvicorn itself waits for the rest of a request for ever."""

import asyncio
import threading
import time


HEAD_SECONDS = 15  # for the head of a request; a connection is closed after 15 to 30 s of waiting
BODY_SECONDS = 120  # for the body: 10 MB at 700 kbit/s


def close_half_sent(server, seconds: float = HEAD_SECONDS):
    """Watch a uvicorn server in a thread, and close connections on which no head of a request arrives in time."""

    def watch():
        before = {}
        while True:
            time.sleep(seconds)
            waiting = {each: each.cycle for each in [*server.server_state.connections] if awaits_head(each)}
            for connection, cycle in waiting.items():
                if connection in before and before[connection] is cycle:  # no request came since the last look
                    connection.loop.call_soon_threadsafe(connection.transport.abort)
            before = waiting

    threading.Thread(target=watch, daemon=True).start()


def awaits_head(connection) -> bool:
    """Return whether a connection waits for the head of a request. A web socket never does, and has no `cycle`."""
    cycle = getattr(connection, "cycle", connection)
    return cycle is None or getattr(cycle, "response_complete", False)


def bounded_body(receive, most: int, seconds: float = BODY_SECONDS):
    """Return an ASGI `receive` that disconnects if the body is larger than `most` bytes or takes too long.

    After the body, `receive` has no time limit, because it then only waits for the visitor to disconnect.
    """
    received, is_complete, end = 0, False, time.monotonic() + seconds

    async def bounded():
        nonlocal received, is_complete
        try:
            message = await asyncio.wait_for(receive(), None if is_complete else max(0, end - time.monotonic()))
        except TimeoutError:
            return {"type": "http.disconnect"}
        received += len(message.get("body", b""))
        is_complete = is_complete or not message.get("more_body", False)
        return message if received <= most else {"type": "http.disconnect"}

    return bounded
