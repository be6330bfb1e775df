"""Where text for people goes."""

from rich.console import Console


def console() -> Console:
    """The terminal in its own width; a pipe, which has none, gets room for tables."""
    found = Console()
    return found if found.is_terminal else Console(width=160)
