"""`annexe predict`: ask a trained model about photos and videos of one's own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from annexe.config import Config
from annexe.datasets.photos import refused_photos
from annexe.errors import UserError
from annexe.files import locked
from annexe.inference import video
from annexe.inference.inputs import find_inputs
from annexe.inference.job import Plan, Written, depends_on, file_of, join, make_plan, predict_share
from annexe.inference.journal import require_free
from annexe.inference.outputs import FORMS, AnswerFiles
from annexe.inference.predictor import Predictor, inference_config
from annexe.inference.processes import Processes
from annexe.inference.questions import questions_of
from annexe.inference.results import Photo
from annexe.terminal import say, track, with_time_left

_EXAMPLES = """\
examples:
  annexe predict runs/demo photo.jpg --out out
      what happens in the photo: its analysis
  annexe predict runs/demo photo.jpg --ask "Where is the mug?" "What is held?" --out out
      two questions, whose answers are drawn in out/photo-1.jpg and out/photo-2.jpg
  annexe predict runs/demo 'photos/**/*.jpg' --ask-file questions.csv --save png --out out
      a folder of folders, for each photo the questions of a table, masks as PNG files
  torchrun --standalone --nproc_per_node 8 -m annexe predict runs/demo photos --out out
      eight GPUs, which share the photos

Every call writes out/predictions.jsonl, a line for each photo and each question. A call that was
interrupted goes on where it was when it is repeated.
"""


@dataclass(frozen=True)
class _Work:
    """What the main process found that there is to do.

    Attributes:
        plan: for the photos that can be read by their header.
        refused: other photos, and why.
        files: all photos.
        videos: with their questions.
    """

    plan: Plan
    refused: dict[Path, str]
    files: list[Path]
    videos: list[tuple[Path, tuple[str, ...]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "annexe predict RUN INPUT [INPUT ...] --out DIR [--ask QUESTION [QUESTION ...]] [options]"
    )
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=os.path.expanduser,
        help="folder of a training run or of one of its checkpoints, or user/repo on the hub",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="photos (.jpg, .png, .webp), videos (.mp4 and others), folders of them, or patterns "
        "in quotes, in which ** stands for folders of any depth",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for all that is written: a new one, or that of the same command before",
    )

    # Questions
    questions = parser.add_argument_group("questions (without any, photos are analyzed alone)")
    questions.add_argument(
        "--ask", nargs="+", default=[], metavar="QUESTION", help="asked of every photo"
    )
    questions.add_argument(
        "--ask-file",
        type=Path,
        metavar="FILE",
        help="text file with one question a line, asked of every photo; or .csv or .jsonl with "
        "the columns photo and question, each asked of its photo",
    )

    # What is written
    parser.add_argument(
        "--save",
        type=_forms,
        default="overlay,video",
        metavar="FORMS",
        help="what is written beside the lines, separated by commas: overlay (a picture with the "
        "masks for each answer), png (mask files at the size of the photo), video (a copy of each "
        "video with the masks); jsonl alone writes the lines only (default: %(default)s)",
    )

    # The model
    model = parser.add_argument_group("model")
    model.add_argument(
        "--batch-size",
        type=_at_least_one,
        default=4,
        metavar="N",
        help="photos that go through the model together (default: %(default)s); the last digits "
        "of scores depend on it",
    )
    model.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU",
    )
    model.add_argument(
        "--compile", action="store_true", help="compile the model: pays for thousands of photos"
    )
    model.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over those of the run, "
        "such as run.max_new_tokens=30 model.presence_threshold=0.3",
    )
    video.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answer, draw and write batch by batch; what earlier calls of the same command did stays.

    Raises:
        UserError: for wrong arguments, and where no photo can be read.
        SystemExit: with code 2, if a photo could not be read, and 130, if it was interrupted.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda but torch sees no GPU; set --device cpu, or auto")
    config, checkpoint = inference_config(
        arguments.run_folder,
        device=arguments.device,
        dtype=arguments.dtype,
        compile=arguments.compile,
        batch_size=arguments.batch_size,
        options=arguments.options,
    )
    processes = Processes(config.run)
    predictor = cache(lambda: Predictor.from_config(config, checkpoint))
    with ExitStack() as held:
        # The main process plans, and holds the folder until the end
        work = processes.from_main(
            lambda: _prepare(arguments, config, checkpoint, processes.count, held)
        )
        processes.require_shared(arguments.out, "--out")
        try:
            _predict_photos(arguments, work.plan, processes, predictor)
            videos = _predict_videos(arguments, work.videos, processes, predictor)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU has no memory for {config.run.batch_size} photos at a time; "
                "set a smaller --batch-size and another --out"
            ) from None
        except KeyboardInterrupt:
            if processes.is_main:
                say(f"stopped; what is done is in '{arguments.out}', and the same command goes on")
            sys.exit(130)
        unreadable = join(work.plan) if processes.is_main else {}
    processes.leave()

    # What has no answers
    photos = []
    for file in work.files:
        reason = work.refused.get(file) or unreadable.get(file.name)
        if reason is not None:
            photos.append(reason)
    if processes.is_main and (photos or videos):
        _say_unanswered("photos", len(work.files), photos)
        _say_unanswered("videos", len(work.videos), videos)
        sys.exit(2)


def _prepare(
    arguments: argparse.Namespace,
    config: Config,
    checkpoint: Path,
    num_processes: int,
    held: ExitStack,
) -> _Work:
    """Find photos, videos and questions, lock the folder, and see what is done already.

    Raises:
        UserError: for wrong arguments, and where no photo can be read.
    """
    # Photos and videos with their questions
    out = arguments.out
    inputs = find_inputs(arguments.inputs, leave_out=out)
    files = inputs.photos
    questions = questions_of([*files, *inputs.videos], arguments.ask, arguments.ask_file)
    reasons = refused_photos(files)
    if files and len(reasons) == len(files) and not inputs.videos:
        raise UserError(reasons[files[0]])
    photos = []
    for file, asked in zip(files, questions, strict=False):
        if file not in reasons:
            photos.append(Photo.of(file, asked))
    videos = list(zip(inputs.videos, questions[len(files) :], strict=True))

    # What is done already
    require_free(out)
    held.enter_context(locked(out, setting="--out"))
    forms = set(arguments.save) & {"overlay", "png"}
    plan = make_plan(
        out,
        depends_on(photos, files, forms, checkpoint, config),
        photos,
        batch_size=config.run.batch_size,
        num_processes=num_processes,
    )
    num_done = len(plan.batches) - len(plan.todo)
    if num_done:
        say(f"going on after {num_done} of {len(plan.batches)} batches, which are in '{out}'")
    return _Work(plan, reasons, files, videos)


def _predict_photos(
    arguments: argparse.Namespace,
    plan: Plan,
    processes: Processes,
    predictor: Callable[[], Predictor],
) -> None:
    """Predict this process's batches; one process alone prints the answers."""
    share = processes.share(plan.todo)
    if not share:
        return
    target = plan.target(processes.rank)
    files = AnswerFiles(arguments.out, arguments.save)
    with ExitStack() as held:
        if plan.in_parts:
            held.enter_context(locked(target.folder, setting="--out"))
        target.open()
        batches = predict_share(plan, share, target, predictor(), files)
        held.enter_context(closing(batches))
        num_photos = sum(len(plan.batches[batch]) for batch in share)
        what = "photos" if processes.count == 1 else f"photos of process 1 of {processes.count}"
        timed = with_time_left(batches, num_photos, what)
        for written in track(timed, "predicting", len(share), disable=not processes.is_main):
            for each in written if processes.count == 1 else ():
                _say_answers(each)


def _predict_videos(
    arguments: argparse.Namespace,
    videos: list[tuple[Path, tuple[str, ...]]],
    processes: Processes,
    predictor: Callable[[], Predictor],
) -> list[str]:
    """Predict this process's videos.

    Returns:
        Why videos of any process could not be answered, or not to their end.
    """
    share = processes.share(videos)
    reasons: list[str] = []
    if share:
        files = [file for file, _ in share]
        questions = [asked for _, asked in share]
        reasons = video.run(arguments, predictor(), files, questions, arguments.out)
    return processes.gather(reasons)


def _say_answers(written: Written) -> None:
    """Print what came of a photo."""
    if written.result is None:
        return
    say(f"{file_of(written.photo)}: {written.result.analysis}", style="bold")
    for index, answer in enumerate(written.result.answers):
        picture = f", {written.pictures[index]}" if written.pictures else ""
        say(f"  {answer.question}")
        say(f"    {answer.text}  (presence {answer.presence:.2f}{picture})")


def _say_unanswered(what: str, count: int, reasons: list[str]) -> None:
    """Say which photos or videos have no answers, and why."""
    if not reasons:
        return
    counts = f"{count - len(reasons)} of {count} {what} were answered, not these {len(reasons)}"
    fix = "mend them, then name them alone, with another --out"
    say(f"{counts} ({fix}):", style="red", stderr=True)
    for reason in reasons:
        say(f"  {reason}", style="red", stderr=True)


def _forms(text: str) -> tuple[str, ...]:
    """The value of ``--save``: names separated by commas."""
    forms = [form.strip() for form in text.split(",") if form.strip()]
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise argparse.ArgumentTypeError(
            f"'{unknown[0] if unknown else text}' is none of {', '.join(FORMS)}; "
            "separate several by commas, as in jsonl,overlay,png"
        )
    return tuple(dict.fromkeys(forms))


def _at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)
