"""Commands in processes of their own, forked off one that has imported the package already.

That saves the seconds in which a new interpreter imports torch and transformers.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from torch.multiprocessing import start_processes

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["annexe.cli", "annexe.evaluator", "annexe.trainer", "pytest"])


class Command:
    """A script or a module that runs with a command line, in the environment of this process."""

    def __init__(self, *words: object, folder: Path) -> None:
        """Start it at once.

        Args:
            words: a script or ``-m`` and a module, and what follows them on the command line.
            folder: takes files of what it prints.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._files = (folder / "output.txt", folder / "errors.txt")
        for file in self._files:
            file.write_text("")
        arguments = ([str(word) for word in words], dict(os.environ), self._files)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end, and give its exit code; minus a signal's number if that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it runs on after {seconds} seconds"
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it as ``kill -9`` does; it must not have ended before."""
        self._process.kill()
        assert self.wait() == -signal.SIGKILL, f"it ended before: {self.errors()}"

    def output(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text()

    def errors(self) -> str:
        """What it has printed so far on standard error."""
        return self._files[1].read_text()


def run_together(work: Callable[..., None], arguments: tuple, num_processes: int) -> None:
    """Run ``work(rank, *arguments)`` in several processes; a failure in any fails."""
    start_processes(work, arguments, num_processes, start_method="forkserver")


def _run(words: list[str], environment: dict[str, str], files: tuple[Path, Path]) -> None:
    """Run a command line in this process, with files for output and errors."""
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
