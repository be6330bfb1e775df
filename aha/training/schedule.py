"""What changes over the course of a training run: learning rate and temperature. Pure functions of the step."""

import math


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.06) -> float:
    """Cosine warm-up from peak/25 over the first ``warmup`` share of the steps, then cosine down to peak/25/10⁴."""
    start, end = peak / 25, peak / 25 / 1e4
    rise = max(1.0, warmup * total)
    if step < rise:
        return _cosine(start, peak, step / rise)
    return _cosine(peak, end, (step - rise) / max(1.0, total - 1 - rise))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def temperature(step: int, total: int, start: float, end: float, kind: str) -> float:
    """τ from ``start`` to ``end``, both reached, along a line or a geometric sequence."""
    progress = min(1.0, step / max(1, total - 1))
    if kind == "linear":
        return start + (end - start) * progress
    if kind == "geometric":
        return start * (end / start) ** progress
    raise ValueError(f"schedule {kind!r} is not known: choose linear or geometric")
