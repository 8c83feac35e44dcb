"""A bar for what is done once, before training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives the function that counts n rows as done; its first call shows a bar, with the time left if it is known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, transient=True, console=console, disable=not console.is_interactive)
    task = bar.add_task(description, total=total)

    def advance(rows: int) -> None:
        bar.start()
        bar.advance(task, rows)

    try:
        yield advance
    finally:
        if bar.live.is_started:  # stopping prints an empty line where nothing was shown
            bar.stop()
