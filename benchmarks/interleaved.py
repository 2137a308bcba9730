"""Times things that do the same in turns, in one process, so that all of them meet the same machine."""

import json
import statistics
import time

import torch


def wall() -> float:
    """Return the time in seconds, once the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def race(contenders: dict, rounds: int, units: int, unit: str = "image") -> dict:
    """Call each contender `rounds` times in turns, after once to warm up; return its speed and its ratio to the first.

    Args:
        contenders: name -> function that processes `units` units, e.g. images. Ratios are of their medians of time
            over that of the first, which is ours: 2 means that ours takes half as long.
    """
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            start = wall()
            contender()
            if turn:
                seconds[name].append(wall() - start)
    ours = next(iter(seconds.values()))
    result = {}
    for name, times in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, ours)]
        result[name] = {
            f"{unit}s_per_second": units / statistics.median(times),
            "ratio": statistics.median(times) / statistics.median(ours),
            "ratio_from": min(ratios),
            "ratio_to": max(ratios),
        }
    return result


def report(results: dict, path: str | None):
    """Print results, name -> contender -> numbers, as Markdown tables, and write them to a JSON file."""
    for what, rows in results.items():
        columns = list(next(iter(rows.values())))
        print(f"\n**{what}**\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, numbers in rows.items():
            print(f"| {name} | {' | '.join(f'{value:.4g}' for value in numbers.values())} |")
    if path is not None:
        with open(path, "w") as file:
            json.dump(results, file, indent=2)
