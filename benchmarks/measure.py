"""What the benchmarks share."""

import sys
import time
from collections.abc import Callable


def beside(value: float, target: float | None, at_most: bool = False) -> dict:
    """The value with its target, and whether it is met."""
    met = None if target is None else bool(value <= target if at_most else value >= target)
    return {"value": round(value, 3), "target": target, "met": met}


def take_turns(runs: dict[str, Callable[[], int]], turns: int, wanted: int) -> dict[str, list[float]]:
    """Seconds of each program in each turn behind one that does not count: it is for imports and for the files' way into memory.

    Ends the benchmark when a program does not give ``wanted`` things.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, turns):
        for name, run in runs.items():
            started = time.perf_counter()
            n = run()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
            if n != wanted:
                sys.exit(f"{name} gave {n} of {wanted}")
    return seconds
