"""Pieces of HTML: what the model was trained on, an answer in colors, one-line messages.

Every text of a user, of data or of the model is escaped.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from annexe.inference.page.mask_files import coco_json, png_zip, rle_json
from annexe.inference.results import Answer, PhotoResult
from annexe.prompts import number_placeholders

_PLACEHOLDER = re.compile(r"\s?<MSK_?(\d*)>", re.IGNORECASE)
_DATASETS = {"ego_irgbench": "Ego-IRGBench", "egohos": "EgoHOS"}
# Scores that people outside of the field can read, and how they are called here
_SCORES = {
    "grounding/ciou": "mask overlap (cIoU)",
    "answer/exact_match": "answers word for word",
    "grounding/n_acc": "refused when nothing fits",
}


# What the model was trained on


def header(about: dict[str, Any]) -> str:
    """Name of the page, what it does, and what its model was trained on."""
    return (
        '<div class="annexe-header"><h1>annexe</h1>'
        "<p>Ask about hands and objects in a first-person photo. Everything that the answer names "
        "gets a mask in the same color. If nothing in the photo fits the question, the model says "
        "so.</p>"
        f'<p class="quiet">{escape(training_line(about))}</p></div>'
    )


def training_line(about: dict[str, Any]) -> str:
    """A sentence on what the model was trained on, and what that means for photos."""
    root = about.get("data_root")
    layout = _DATASETS.get(about.get("dataset", ""), about.get("dataset") or "unknown data")
    if root and (Path(root) / "synthetic.json").is_file():
        data = f"synthetic scenes laid out like {layout}"
        warning = " It has never seen a real photo."
    else:
        data = layout
        warning = " Its answers are less reliable for other kinds of photos."
    step = about.get("step")
    steps = f" for {step:,} steps" if isinstance(step, int) else ""
    return f"The model was trained on {data}{steps}.{warning}"


def details(about: dict[str, Any]) -> str:
    """Facts about the model, as a list that opens. Of paths only the last name is told."""
    facts: list[tuple[str, str]] = []
    for key, name in (
        ("run", "run"),
        ("checkpoint", "checkpoint"),
        ("data_root", "folder of the data"),
    ):
        if about.get(key):
            facts.append((name, Path(str(about[key])).name))
    if about.get("image_size"):
        facts.append(("photo as the model sees it", "{0} × {0} pixels".format(about["image_size"])))
    if about.get("num_slots"):
        facts.append(("targets of an answer", f"at most {about['num_slots']}"))
    scores = about.get("scores") or {}
    for key, name in _SCORES.items():
        if isinstance(scores.get(key), float | int):
            facts.append((f"{name}, on test data", f"{100 * scores[key]:.0f} %"))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    summary = "<summary>About this model</summary>"
    return f'<details class="annexe-about">{summary}<dl>{rows}</dl></details>'


# Answers


def answer_card(answer: Answer) -> str:
    """A question, the answer with its phrases in the colors of their masks, and the presence."""
    verdict = ""
    if answer.is_refused:
        verdict = (
            '<p class="verdict"><b>Refused.</b> The model finds nothing in the photo that the '
            "question asks for, so there is no mask.</p>"
        )
    state = "refused" if answer.is_refused else "answered"
    return (
        f'<div class="annexe-answer {state}">'
        f'<p class="quiet">{escape(answer.question)}</p>'
        f'<p class="said">{"".join(_colored(answer))}</p>'
        f"{verdict}{_presence(answer)}</div>"
    )


def _colored(answer: Answer) -> Iterator[str]:
    """The answer's text as HTML: phrases marked, and a swatch in place of each placeholder."""
    colors = {target.slot: target.color for target in answer.targets}
    text = number_placeholders(answer.text, list(colors))
    position = 0
    for piece, slot in answer.parts():
        swatches, position = _swatches(text, position, piece, colors)
        yield swatches
        position += len(piece)
        if slot in colors:
            style = f'style="--color:{colors[slot]}" data-mask="{list(colors).index(slot)}"'
            yield f'<mark class="phrase" {style}>{escape(piece)}</mark>'
        else:
            yield escape(piece)
    yield _swatches(text, position, "", colors)[0]


def _swatches(text: str, position: int, piece: str, colors: dict[int, str]) -> tuple[str, int]:
    """Swatches for the placeholders that stand before ``piece``, and where it begins.

    Args:
        text: the answer with its placeholders.
        position: how far ``text`` is shown already.
        piece: what is shown next; the end of the text if it is empty.
        colors: slot -> color.
    """
    shown = ""
    while placeholder := _PLACEHOLDER.match(text, position):
        if piece and text.startswith(piece, position):
            break
        position = placeholder.end()
        color = colors.get(int(placeholder[1] or 0))
        if color is not None:
            shown += f' <span class="swatch" style="--color:{color}"></span>'
    return shown, position


def _presence(answer: Answer) -> str:
    """A bar that shows how sure the model is that there is a target."""
    percent = 100 * answer.presence
    return (
        '<div class="presence"><span>Presence</span>'
        f'<span class="track"><i style="width:{percent:.0f}%"></i></span>'
        f"<b>{answer.presence:.2f}</b></div>"
        '<p class="quiet small">How sure the model is that the photo shows what is asked for, '
        "from 0 to 1.</p>"
    )


def analysis(result: PhotoResult) -> str:
    """The interaction in a sentence."""
    return (
        '<div class="annexe-analysis"><p class="quiet">Analysis of the photo</p>'
        f"<p>{escape(result.analysis)}</p></div>"
    )


# Messages and downloads


def message(text: str) -> str:
    """One line about what went wrong."""
    return f'<p class="annexe-message" role="alert">{escape(" ".join(text.split()))}</p>'


def hint(text: str) -> str:
    """One quiet line."""
    return f'<p class="annexe-hint">{escape(text)}</p>'


def downloads(result: PhotoResult, answer: Answer) -> str:
    """Links that save the masks; the files are in the links, so that none lies on the server."""
    if answer.is_refused:
        return ""
    links = (
        _link("PNG", f"{result.name}-masks.zip", "application/zip", png_zip(answer)),
        _link("RLE", f"{result.name}-masks.json", "application/json", rle_json(result)),
        _link("COCO", f"{result.name}-coco.json", "application/json", coco_json(result)),
    )
    return f'<div class="annexe-downloads"><span>Save the masks as</span>{"".join(links)}</div>'


def _link(label: str, name: str, kind: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<a download="{escape(name)}" href="data:{kind};base64,{data}">{label}</a>'
