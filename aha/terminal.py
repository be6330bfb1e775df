"""Where text for people goes."""

from collections.abc import Sequence

from rich.console import Console


def console() -> Console:
    """The terminal in its own width; a pipe, which has none, gets room for tables."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


class CommandError(RuntimeError):
    """Part of a command failed; what worked is kept."""


def failed(lines: Sequence[str], of: int, what: str) -> CommandError:
    """All failures of a command in one line, with the number of things it was given."""
    return CommandError(f"{len(lines)} of {of} {what} failed: {'; '.join(lines)}")
