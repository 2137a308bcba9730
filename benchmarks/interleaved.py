"""Time several ways to do the same work in turns, in one process, so that all run under the same conditions."""

import json
import statistics
import time

import torch
from tables import markdown_table


def wall() -> float:
    """Return the time in seconds, after waiting for the GPU, if there is one, to finish its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def race(contenders: dict, rounds: int, units: int, unit: str = "image", after_round=None) -> dict:
    """Time each contender `rounds` times in turns, after one call to warm up.

    Args:
        contenders: name -> function that processes `units` units, e.g. images.
        after_round: called with the result so far after every round; if it returns False, the race ends.

    Returns:
        For each name, its speed and the ratio of its median time to that of the first contender, with the lowest and
        highest ratio of a round. A ratio of 2 means that the first contender takes half as long.
    """
    seconds = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = wall()
            contender()
            seconds[name].append(wall() - start)
        result = compare(seconds, units, unit)
        if after_round is not None and after_round(result) is False:
            break
    return result


def compare(seconds: dict[str, list[float]], units: int, unit: str) -> dict:
    """Return what `race` returns, from the seconds of each contender in each round."""
    first = next(iter(seconds.values()))
    result = {}
    for name, times in seconds.items():
        ratios = [taken / reference for taken, reference in zip(times, first)]
        result[name] = {
            f"{unit}s_per_second": units / statistics.median(times),
            "ratio": statistics.median(times) / statistics.median(first),
            "ratio_from": min(ratios),
            "ratio_to": max(ratios),
        }
    return result


def report(results: dict, path: str | None):
    """Print results (name -> contender -> numbers) as Markdown tables; also write them to the JSON file `path`."""
    for what, rows in results.items():
        print(f"\n{markdown_table(what, rows)}")
    if path is not None:
        with open(path, "w") as file:
            json.dump(results, file, indent=2)
