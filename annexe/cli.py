"""Command lines: `annexe` with its sub-commands, and what the torchrun scripts share."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from annexe import __version__
from annexe.config import Config
from annexe.errors import UserError, unknown_name_error
from annexe.files import FULL_DISK
from annexe.terminal import add_command, escape_unprintable, log_handler, say

# Sub-commands, in the order in which they are listed; each is a module of `annexe.tools`
TOOLS = {
    "synth": "draw synthetic scenes in the layout of Ego-IRGBench",
    "doctor": "check every file of a data root; exit code 1 where there are errors",
    "split": "write split lists that share no video, object instance or room",
    "import-data": "make a data root of labels in another format, and run the doctor over it",
    "export-data": "write the labels of a data root in the format of an annotation tool",
    "score": "score a predictions file of any system",
    "compare": "compare two predictions files on the queries that both hold",
    "convert-predictions": "make predictions.jsonl of masks or COCO results, and of answers",
    "export-predictions": "write predictions.jsonl in the format of another tool",
    "weights": "inspect a checkpoint, export a run, or convert a GGUF file",
    "convert-config": "turn a YAML file of the released ANNEXE code into ours",
    "plan": "predict the GPU memory of a training step, and find settings that fit a card",
    "predict": "analyze your own photos and videos, answer questions, and draw the masks",
    "serve": "answer questions about photos over HTTP, in batches",
    "ablate": "train and evaluate every row of an ablation, and write one table",
    "bench": "measure training, generation, evaluation, serving, loading or scoring",
    "download": "fetch data, public weights or a pushed run from the Hugging Face Hub",
    "push": "publish a trained run on the Hugging Face Hub, with a model card",
}

_SHOWN = 200  # characters of a text that cannot be written

# What gloo and NCCL say where another process of the job died or hangs
_LOST_PROCESS = re.compile(r"gloo/\S+\] (.+)|(remote process exit\w+)")
# What a DataLoader says of a worker that died
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited)|Too many open files")


def exit_on_user_error(work: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run ``work`` with logging set up, and end the process in one line where it fails.

    A mistake of the user, or a file that cannot be used, ends in one line on standard error and
    exit code 2. An interruption ends in exit code 130.

    Args:
        work: what the process is there for.
        interrupted: what is said after an interruption.
    """
    escape_unprintable()

    # Libraries log warnings; annexe logs more, on the main process of a job
    logging.basicConfig(level=logging.WARNING, handlers=[log_handler()])
    is_main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("annexe").setLevel(logging.INFO if is_main else logging.ERROR)

    try:
        work()
    except KeyboardInterrupt:
        say(interrupted, style="red", stderr=True)
        sys.exit(130)
    except UserError as error:
        _exit_with(str(error))
    except RuntimeError as error:
        lost = _LOST_PROCESS.search(str(error))
        if lost:
            reason = (lost[1] or lost[2]).partition(". ")[0]
            _exit_with(
                f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} has lost "
                f"another one ({reason}); see there why it ended, and start the job again: it goes "
                "on where it was, a training with run.resume=auto"
            )
        if not _DEAD_WORKER.search(str(error)):
            raise
        reason = str(error).partition(". ")[0]
        _exit_with(
            f"a process that loads batches is gone ({reason}); give it memory, "
            "'/dev/shm' too (docker run --shm-size=8g, or --ipc=host), or set fewer "
            "run.num_workers, 0 for none"
        )
    except UnicodeEncodeError as error:
        # File names that are not UTF-8 reach Python with surrogates in them
        if not any("\ud800" <= character <= "\udfff" for character in error.object):
            raise
        _exit_with(f"a name is not UTF-8: {error.object[:_SHOWN]!a}; rename it")
    except OSError as error:
        if error.filename is None and error.errno in FULL_DISK:
            _exit_with(f"the disk takes no more ({error.strerror}); make room")
        if error.filename is None:
            raise  # not about a file
        _exit_with(
            f"cannot use '{error.filename}' ({error.strerror}); "
            "name another place, or give it rights and room"
        )


def _exit_with(message: str) -> NoReturn:
    """End the process with an error of one line and exit code 2."""
    say(f"error: {message}", style="red", stderr=True)
    sys.exit(2)


def run_script(
    work: Callable[[Config], object], description: str, *, evaluation: bool = False
) -> None:
    """Entry of a torchrun script: its arguments to a configuration, then ``work`` on that.

    Args:
        work: train or evaluate.
        description: of the script, for ``--help``.
        evaluation: the script also takes ``--dataset``, and its model settings stand over those of
            the checkpoint that it evaluates.
    """
    # The command line
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cfg-path",
        required=True,
        type=os.path.expanduser,
        metavar="YAML",
        help="configuration file",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over the file, such as run.batch_size=8 "
        "datasets.ego_irgbench.data_root=DIR",
    )
    if evaluation:
        parser.add_argument(
            "--dataset", metavar="NAME", help="which data set of the file (default: its only one)"
        )
    arguments = parser.parse_args()

    def load_and_work() -> None:
        # Imported here, because the processes of `annexe synth` do without torch
        from torch import distributed

        from annexe.build import load_config

        # The configuration, with one data set where one is named
        config = load_config(arguments.cfg_path, arguments.options, onto_checkpoint=evaluation)
        name = getattr(arguments, "dataset", None)
        if name is not None:
            if name not in config.datasets:
                raise unknown_name_error("data set", name, config.datasets)
            config.datasets = {name: config.datasets[name]}

        work(config)
        if distributed.is_initialized():
            distributed.destroy_process_group()

    command = "the same command" if evaluation else "with run.resume=auto it"
    exit_on_user_error(load_and_work, f"interrupted; {command} goes on")


def main() -> None:
    """Entry of the ``annexe`` command, which runs the module of a sub-command."""
    # Its imports, which take seconds, can be interrupted too
    exit_on_user_error(_run_tool)


def _run_tool() -> None:
    """Read the command line, and run what it names."""
    parser = argparse.ArgumentParser(
        prog="annexe", description="Egocentric interaction reasoning and grounding."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # Only the named sub-command is imported: a list of all is there at once
    named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    for name, about in TOOLS.items():
        command = add_command(commands, name, about)
        if name == named:
            tool = importlib.import_module(f"annexe.tools.{name.replace('-', '_')}")
            tool.add_arguments(command)
            command.set_defaults(run=tool.run, refuse=command.error)

    # What no argument takes is refused with the usage of the sub-command, not with that of `annexe`
    arguments, unknown = parser.parse_known_args()
    if unknown:
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    for name, value in vars(arguments).items():
        setattr(arguments, name, _expand_home(value))
    arguments.run(arguments)


def _expand_home(value: Any) -> Any:
    """A path, or each of a list, with ``~`` expanded: a shell leaves that of ``--out=~/x``."""
    if isinstance(value, list):
        return [_expand_home(each) for each in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
