"""What the benchmarks share."""


def beside(value: float, target: float | None, at_most: bool = False) -> dict:
    """The value with its target, and whether it is met."""
    met = None if target is None else bool(value <= target if at_most else value >= target)
    return {"value": round(value, 3), "target": target, "met": met}
