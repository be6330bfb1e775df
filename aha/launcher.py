"""What torchrun, accelerate or a scheduler tells a process about the others of its run."""

import os


def told(name: str, default: int = 1, low: int = 1) -> int:
    """The environment variable ``name``, such as WORLD_SIZE, or ``default`` where it is not set.

    Raises:
        ValueError: in one line, where it is no integer ≥ ``low``.
    """
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and len(text) < 10 and int(text) >= low):
        raise ValueError(f"{name}={text[:60]!r}: set it to an integer ≥ {low}, or leave it to torchrun")
    return int(text)
