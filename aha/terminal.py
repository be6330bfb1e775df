"""Where text for people goes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def console() -> Console:
    """The terminal in its own width; a pipe, which has none, gets room for tables."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


@contextmanager
def progress(disable: bool = False) -> Iterator[Callable[[str, int, str, int], None]]:
    """Bars for the time of the context: call with a task, its total, what is being done, and how much more is done."""
    columns = TextColumn("{task.description}", justify="left"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console(), disable=disable) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(task: str, total: int, doing: str, more: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], description=f"{task}: {doing}", advance=more)

        yield advance


class CommandError(RuntimeError):
    """Part of a command failed; what worked is kept."""


def failed(lines: Sequence[str], of: int, what: str) -> CommandError:
    """All failures of a command in one line, with the number of things it was given."""
    return CommandError(f"{len(lines)} of {of} {what} failed: {'; '.join(lines)}")
