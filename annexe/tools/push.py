"""`annexe push`: a trained run onto the Hugging Face Hub, with a card."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from annexe.checkpoints.run_folder import load_progress, require_checkpoint
from annexe.errors import UserError
from annexe.files import in_units, replaced, require_writable
from annexe.hub.card import write_card
from annexe.hub.client import has_token
from annexe.hub.publish import CARD, publish, upload
from annexe.hub.runs import is_hub_name
from annexe.terminal import say

_EXAMPLES = """\
examples:
  annexe push runs/annexe user/repo --out published
      what would be public, to be looked at
  annexe push runs/annexe user/repo --private
      a repository that 'annexe predict user/repo' and 'annexe download user/repo' take

Paths and names of the machine are left out. It takes HF_TOKEN, or 'hf auth login'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=os.path.expanduser,
        help="folder of a training run, or of one of its checkpoints",
    )
    parser.add_argument("repository", metavar="REPO", help="user/repo; made if it does not exist")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "latest"),
        default="best",
        help="which one of a run (default: %(default)s)",
    )
    parser.add_argument("--private", action="store_true", help="make a repository only you can see")
    parser.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the files there, and upload nothing"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write what is published, and upload it.

    Raises:
        UserError: for a run without a checkpoint, a name that cannot be, no login, and for what
            the hub refuses.
    """
    name = arguments.repository
    if not is_hub_name(name) or "@" in name:
        raise UserError(f"'{name}' is no name of a repository; give user/repo")
    checkpoint = require_checkpoint(arguments.run_folder, arguments.checkpoint)
    if arguments.out is not None:
        if arguments.out.exists():
            raise UserError(f"'{arguments.out}' exists already; name a new folder")
        require_writable(arguments.out)
        prepare(checkpoint, arguments.out, name, arguments.license)
        return
    if not has_token():
        raise UserError("no token: log in with 'hf auth login', or set HF_TOKEN to one that writes")

    with tempfile.TemporaryDirectory(prefix="annexe-push-") as folder:
        prepared = Path(folder) / "run"
        prepare(checkpoint, prepared, name, arguments.license)
        message = f"Step {load_progress(checkpoint).step} of a training with annexe"
        address = upload(prepared, name, private=arguments.private, message=message)
    say(f"pushed: {address}")
    say(f'use it: Predictor.from_run("{name}"), annexe predict {name} PHOTO --out DIR')


def prepare(checkpoint: Path, folder: Path, name: str, license: str | None) -> None:
    """Write the files of a run and its card to a new folder, and say what they are."""
    with replaced(folder) as part:
        published = publish(checkpoint, part, name.partition("/")[2])
        (part / CARD).write_text(write_card(name, published, license), encoding="utf-8")

    # What goes out, and what does not
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    say(f"'{checkpoint}': {len(sizes)} files, {in_units(sum(sizes))}")
    if published.replaced:
        say(f"replaced, because they name files or an account: {', '.join(published.replaced)}")
    for setting, path in published.needed.items():
        say(f"not in it, users fetch it themselves: {setting}, as {path}")
    if not published.scores:
        say("the card has no scores: evaluate this checkpoint into RUN/eval to have them in it")
