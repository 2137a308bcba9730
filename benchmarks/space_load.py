"""Send many visitors to the Space at once, and print its answers, refusals, errors and memory.

    python benchmarks/space_load.py --model runs/digits --visitors 50 --seconds 120

The program starts the Space on that model and stops it at the end. Each visitor repeats three things: send one of four
requests at random, wait for the result, pause for a moment. When the queue is full, a visitor is refused and comes
back a little later. Every other failure is an error, and makes the exit code 1.
"""

import argparse
import asyncio
import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image


ROOT = Path(__file__).parent.parent
OWN = ["The model's own", None, ""]
REQUESTS = {
    "generate": lambda image, seed: [4, "DDIM", 50, seed, "", 1],
    "restore": lambda image, seed: ["Upload", image, "", "Hole", "Medium", seed],
    "degrade": lambda image, seed: [*OWN, "Blur", "Strong", seed % 50],
    "forward": lambda image, seed: ["Upload", image, "", seed % 200, 0],
}


async def visit(url: str, k: int, end: float, *, served: Counter, errors: list, waits: list):
    """Be visitor k until `end`. Count answers and "refused" in `served`, and add to `errors` and `waits` (seconds)."""
    choose, photo = random.Random(k), io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(photo, "JPEG")
    async with httpx.AsyncClient(base_url=f"{url}/gradio_api", timeout=300) as client:
        while time.monotonic() < end:
            name, start = choose.choice([*REQUESTS]), time.monotonic()
            try:
                (await client.get(url)).raise_for_status()
                files = {"files": ("photo.jpg", photo.getvalue())}
                upload = (await client.post("/upload", files=files)).raise_for_status().json()[0]
                image = {"path": upload, "meta": {"_type": "gradio.FileData"}}
                data = REQUESTS[name](image, choose.randrange(10**6))
                answer = await client.post(f"/call/{name}", json={"data": data})
                if answer.status_code == 503 and "Queue is full" in answer.text:
                    served["refused"] += 1
                    await asyncio.sleep(choose.uniform(1, 4))
                    continue
                events = await client.get(f"/call/{name}/{answer.raise_for_status().json()['event_id']}")
                last = events.text.strip().split("\n\n")[-1]
                if not last.startswith("event: complete"):
                    raise RuntimeError(last[:200])
                served[name] += 1
                waits.append(time.monotonic() - start)
            except (httpx.HTTPError, RuntimeError) as error:
                errors.append(f"{name}: {type(error).__name__} {error}")
            await asyncio.sleep(choose.uniform(0.2, 1))


async def visit_all(url: str, visitors: int, seconds: float):
    end, served, errors, waits = time.monotonic() + seconds, Counter(), [], []
    await asyncio.gather(*(visit(url, k, end, served=served, errors=errors, waits=waits) for k in range(visitors)))
    return served, errors, waits


def memory(pid: int, field: str = "VmRSS") -> float:
    """Return the memory of a process in MB: VmRSS is the memory now, VmHWM the peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/digits", help="folder or Hub id of the model; default: runs/digits")
    parser.add_argument("--visitors", type=int, default=50, help="visitors at once; default: 50")
    parser.add_argument("--seconds", type=float, default=120, help="how long they visit, in seconds; default: 120")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", {"DDPM_MODEL": arguments.model, "GRADIO_SERVER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "spaces" / "app.py")]
    server = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                httpx.get(url)
                break
            except httpx.ConnectError:
                time.sleep(0.3)
        else:
            sys.exit("The Space did not start.")
        before, minutes = memory(server.pid), []
        done = threading.Event()

        def watch():
            while not done.wait(arguments.seconds / 8):
                minutes.append(memory(server.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        served, errors, waits = asyncio.run(visit_all(url, arguments.visitors, arguments.seconds))
        done.set()
        watching.join()
        refused = served.pop("refused", 0)
        print(
            f"{arguments.visitors} visitors, {arguments.seconds:.0f} s, {os.cpu_count()} cores, load {os.getloadavg()}"
        )
        print(f"served   {served.total():,}: " + ", ".join(f"{n:,} {name}" for name, n in sorted(served.items())))
        if waits:
            print(f"waited   {np.median(waits):.1f} s (median), {np.max(waits):.1f} s at most")
        print(f"refused  {refused:,} by the full queue")
        print(f"errors   {len(errors)}", *errors[:10], sep="\n  ")
        print(f"memory   {before:.0f} MB at the start, then " + ", ".join(f"{one:.0f}" for one in minutes))
        print(f"         {memory(server.pid):.0f} MB at the end, {memory(server.pid, 'VmHWM'):.0f} MB at its peak")
    finally:
        server.terminate()
        server.wait()
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
