"""Command lines: the `annexe` command with its sub-commands, and what the two torchrun scripts share."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable

from rich.logging import RichHandler

from annexe import __version__
from annexe.config import Config
from annexe.errors import UserError, unknown_name_error
from annexe.terminal import say

TOOLS = (
    *(
        "synth",
        "doctor",
        "split",
        "score",
        "compare",
        "convert-predictions",
        "weights",
        "convert-config",
        "plan",
    ),
    *("predict", "ablate", "bench"),
)


def exit_on_user_error(work: Callable[[], None]) -> None:
    """Run ``work``; a mistake of the user, or a file that fails, ends in one line on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)]
    )
    logging.getLogger("annexe").setLevel(
        logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    )
    try:
        work()
    except KeyboardInterrupt:
        say("interrupted; a training goes on with run.resume=auto", style="red", stderr=True)
        sys.exit(130)
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            if error.filename is None:
                raise  # not about a file
            message = (
                f"cannot use '{error.filename}' ({error.strerror}); "
                "name another place, or give it rights and room"
            )
        say(f"error: {message}", style="red", stderr=True)
        sys.exit(2)


def run_script(
    work: Callable[[Config], object], description: str, *, evaluation: bool = False
) -> None:
    """Entry of a torchrun script: ``--cfg-path`` and ``--options`` to a configuration, then ``work`` on it.

    An evaluation also takes ``--dataset``, and its model settings stand over those of its checkpoint.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="configuration file")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over the file, such as run.batch_size=8 datasets.ego_irgbench.data_root=DIR",
    )
    if evaluation:
        parser.add_argument(
            "--dataset", metavar="NAME", help="which data set of the file (default: its only one)"
        )
    arguments = parser.parse_args()

    def load_and_work() -> None:
        # Here, because the processes of `annexe synth` do without torch
        from annexe.build import load_config

        config = load_config(arguments.cfg_path, arguments.options, onto_checkpoint=evaluation)
        name = getattr(arguments, "dataset", None)
        if name is not None:
            if name not in config.datasets:
                raise unknown_name_error("data set", name, config.datasets)
            config.datasets = {name: config.datasets[name]}
        work(config)
        from torch import distributed  # here, for the processes of `annexe synth` do without

        if distributed.is_initialized():
            distributed.destroy_process_group()

    exit_on_user_error(load_and_work)


def main() -> None:
    """Entry of the ``annexe`` command: parse, then run the sub-command's module in `annexe.tools`."""
    parser = argparse.ArgumentParser(
        prog="annexe", description="Egocentric interaction reasoning and grounding."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = sys.argv[1:2]
    for name in (
        asked if asked and asked[0] in TOOLS else TOOLS
    ):  # one tool does not wait for the imports of all
        tool = importlib.import_module(f"annexe.tools.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=tool.HELP, description=tool.HELP)
        tool.add_arguments(command)
        command.set_defaults(run=tool.run)
    arguments = parser.parse_args()
    exit_on_user_error(lambda: arguments.run(arguments))
