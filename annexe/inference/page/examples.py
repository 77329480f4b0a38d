"""Photos and questions of the data that a run was trained on, to try the page with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from annexe.datasets.annotations import Annotation, read_annotations
from annexe.datasets.image_names import annotation_folders
from annexe.errors import UserError

MAX_EXAMPLES = 6
_SPLITS = ("test", "val", "train")  # the first with files is taken; the model did not learn test


def examples_of(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Photos with a question each, spread over a split of the run's data.

    Every third question has no target, so that a refusal can be seen too. What cannot be read is
    left out, and where the data is not there any more, there are no examples.

    Args:
        about: what there is to know of the model; see `Predictor`.
    """
    # The split
    root = Path(about.get("data_root") or "")
    try:
        folders = annotation_folders(root)
    except (UserError, OSError):
        return []
    split = next((split for split in _SPLITS if folders.get(split)), None)
    if split is None:
        return []

    # Photos at even distances
    stems = folders[split]
    num_examples = min(MAX_EXAMPLES, len(stems))
    examples = []
    for index in range(num_examples):
        stem = stems[index * len(stems) // num_examples]
        photo = root / "RGB" / f"{stem}.jpg"
        try:
            annotations = read_annotations(root / "dataset_split" / split / f"{stem}.json")
        except UserError:
            continue
        if photo.is_file():
            examples.append((str(photo), _question(annotations, wants_target=index % 3 != 2)))
    return examples


def _question(annotations: list[Annotation], *, wants_target: bool) -> str:
    """A question with or without a target; of those with targets, one with as many as there are."""
    fitting = [annotation for annotation in annotations if bool(annotation.slots) is wants_target]
    chosen = max(fitting or annotations, key=lambda annotation: len(annotation.slots))
    wordings = [question for question in chosen.questions if question["is_sentence"]]
    return (wordings or chosen.questions)[0]["query"]
