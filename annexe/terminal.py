"""What commands print: help, lines of text, tables, and bars of progress."""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich import get_console, progress
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_STDERR = Console(stderr=True)


def escape_unprintable() -> None:
    """Print what has no character in the encoding of the output, such as odd names, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def add_command(
    commands: Any, name: str, about: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Add a sub-command, whose help begins with what the list of commands says of it.

    Args:
        commands: what ``add_subparsers`` gave.
        about: what it does, without a capital and a full stop.
        examples: end of its help, printed as it is.
    """
    return commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def log_handler() -> logging.Handler:
    """What writes log records to standard output: each a line, wrapped on a terminal alone."""
    if get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler


class _OneLine(logging.Formatter):
    """Formats a record as one line; only a traceback stands on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join(super().formatMessage(record).splitlines())


def say(text: str, *, style: str | None = None, stderr: bool = False) -> None:
    """Print text as it is: brackets are no markup, numbers get no color, lines are not wrapped.

    Args:
        style: of the text, such as ``bold`` or ``red``.
        stderr: print to standard error.
    """
    _console(stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    has_total: bool = False,
) -> None:
    """Print a table. Names that are too long for their column are wrapped, never cut.

    Args:
        headers: one for each column.
        rows: a text for each column.
        title: stands above the table in one line.
        has_total: the last row is the sum of the others.
    """
    columns = [Column(header, overflow="fold") for header in headers]
    printed = Table(*columns, title=title)
    for row in rows:
        printed.add_row(*row)
    if has_total:
        printed.rows[-1].style = "bold"
    _console(stderr=False).print(printed, soft_wrap=True)


def track(
    items: Iterable[Item],
    description: str,
    total: float | None = None,
    *,
    transient: bool = False,
    disable: bool = False,
    stderr: bool = False,
) -> Iterable[Item]:
    """Give the items one by one, and show how many are done.

    Args:
        description: stands before the bar.
        total: number of items, for those that do not know it.
        transient: the bar goes away at the end.
        disable: show nothing.
        stderr: show the bar on standard error, and only if that is a terminal.
    """
    console = _console(stderr)
    return progress.track(
        items,
        description,
        total,
        console=console,
        transient=transient,
        disable=disable or (stderr and not console.is_terminal),
    )


def with_time_left(
    groups: Iterable[list[Item]], total: int, what: str, every: float = 30
) -> Iterator[list[Item]]:
    """Give groups one by one, and log how far they are, where there is no terminal for a bar.

    Args:
        groups: of what is counted.
        total: items in all groups together.
        what: the items are, such as ``photos``.
        every: seconds between two lines.
    """
    has_bar = get_console().is_terminal
    start = said = time.perf_counter()
    num_done = 0
    for group in groups:
        yield group
        num_done += len(group)
        now = time.perf_counter()
        if not has_bar and num_done < total and now - said >= every:
            said = now
            rate = num_done / (now - start)
            left = timedelta(seconds=round((total - num_done) / rate))
            message = "%d of %d %s, %.1f a second, %s left"
            log.info(message, num_done, total, what, rate, left)


@contextmanager
def counting_bytes(
    description: str, total: int, every: float = 30
) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of a long work are done: as a bar, or as log lines without a terminal.

    Args:
        description: stands before the bar.
        total: bytes of all the work.
        every: seconds between two log lines.

    Yields:
        A function that is told how many bytes were done since it was last called. Threads may
        call it at once.
    """
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = get_console()
    num_done = 0
    start = said = time.perf_counter()
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def count(num_bytes: int) -> None:
            nonlocal num_done, said
            num_done += num_bytes
            bar.advance(task, num_bytes)
            now = time.perf_counter()
            if not console.is_terminal and num_done < total and now - said >= every:
                said = now
                rate = num_done / (now - start)
                left = timedelta(seconds=round((total - num_done) / max(rate, 1)))
                message = "%s: %.1f of %.1f GB, %.1f MB a second, %s left"
                log.info(message, description, num_done / 1e9, total / 1e9, rate / 1e6, left)

        yield count


def _console(stderr: bool) -> Console:
    """Standard output as log lines have it too, so that they stand above a bar; or errors."""
    return _STDERR if stderr else get_console()
