"""The card of a published run: what it is, how to use it, its data, scores, protocol and limits."""

from __future__ import annotations

from typing import Any

import yaml

from annexe.hub.catalog import ITEMS
from annexe.hub.publish import Published

_TAGS = ["annexe", "egocentric", "hand-object-interaction", "image-segmentation", "vqa"]

# Scores that a card shows, with their names
_SHOWN = {
    "grounding/ciou": "cIoU",
    "grounding/giou": "gIoU",
    "grounding/n_acc": "N-acc, queries without a target",
    "grounding/t_acc": "T-acc, queries with a target",
    "answer/exact_match": "answers, exact match",
    "answer/cider": "answers, CIDEr",
    "analysis/cider": "analyses, CIDEr",
    "presence/accuracy": "presence, accuracy",
    "depth/delta1": "depth, δ1",
}

_INTRODUCTION = """\
# {title}

A model of [ANNEXE](https://github.com/yuggiehk/annexe) (unified analyzing, answering and pixel
grounding for egocentric interaction), trained with annexe {version}. It sees a first-person photo
of hands and objects, analyzes it in a sentence, answers questions, and draws a mask of each thing
that an answer names.

## Use

```python
from annexe import Predictor

predictor = Predictor.from_run("{name}")
(result,) = predictor.predict("photo.jpg", "Where is the left hand?")
print(result.analysis, result.answers[0].text)
```

`annexe predict {name} photo.jpg --ask "Where is the left hand?" --out answers` does the same from
the command line, and `model.init_from: {name}` starts a training from it.
"""

_LIMITS = """\
## Limits

- Photos unlike those of the data above, other kinds of objects and other words were not tested.
- The model can be wrong and sound sure. Presence scores are calibrated on the validation split of
  its data alone.
- Do not use it to identify people, or where a wrong answer does harm.
- The licenses of the data and of the weights that it builds on apply to it.
"""


def write_card(name: str, published: Published, license: str | None = None) -> str:
    """The text of a card: Markdown behind a head of YAML.

    Args:
        name: of the repository.
        license: an identifier of the hub, such as ``apache-2.0``; None leaves it out.
    """
    head: dict[str, Any] = {"library_name": "annexe", "language": "en", "tags": _TAGS}
    if license is not None:
        head["license"] = license
    title = name.partition("/")[2]
    version = published.manifest.get("annexe", "of an unknown version")
    sections = [
        _INTRODUCTION.format(title=title, name=name, version=version),
        _needed(published),
        _training(published),
        _scores(published),
        _LIMITS,
    ]
    body = "\n".join(section for section in sections if section)
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}"


def _needed(published: Published) -> str:
    """Weights and modules that the repository does not hold."""
    lines = []
    for setting, path in published.needed.items():
        item = next((item for item in ITEMS if path.startswith(str(item.folder))), None)
        where = f"`{path}`"
        if item is not None:
            where += f" (`annexe download {item.name}`; license: {item.license})"
        lines.append(f"- `{setting}`: {where}")
    for module in published.settings["imports"]:
        lines.append(f"- the Python module `{module}`, which its settings import")
    if not lines:
        return ""
    first = next(iter(published.needed), None)
    if first is not None:
        lines.append(
            "\nWeights that lie elsewhere are named with "
            f'`Predictor.from_run(..., options=["{first}=PATH"])`.'
        )
    return "\n".join(["## What it needs besides", "", *lines, ""])


def _training(published: Published) -> str:
    """Data, schedule and size of the model."""
    # Data, schedule and sizes
    run = published.settings["run"]
    model = published.settings["model"]
    progress = published.progress
    datasets = ", ".join(f"`{name}`" for name in published.settings["datasets"])
    fingerprint = str(published.manifest.get("data_fingerprint", "unknown"))[:12]
    lines = [
        "## Data and training",
        "",
        f"- data set: {datasets} (fingerprint `{fingerprint}`)",
        f"- {progress['step']:,} steps, {progress['images']:,} photos and "
        f"{progress['queries']:,} questions seen; seed {run['seed']}",
        f"- {run['optimizer']}, learning rate {run['learning_rate']:g}, "
        f"{run['batch_size']} photos a process and micro-batch",
        f"- photos of {model['rgb_encoder']['image_size']} pixels a side, "
        f"{model['pixel_decoder']['num_slots']} targets in an answer at most",
    ]

    # What it started from, and what a reader will miss
    if published.started_from is not None:
        beside = ", which lies in `start/`" if published.has_start else ""
        lines.append(f"- started from `{published.started_from}`{beside}")
    if published.replaced:
        replaced = ", ".join(f"`{name}`" for name in published.replaced)
        lines.append(f"- settings that named files or an account, replaced here: {replaced}")
    return "\n".join([*lines, ""])


def _scores(published: Published) -> str:
    """Scores beside their intervals, and the protocol behind them."""
    if not published.scores:
        return "## Scores\n\nThis checkpoint comes without an evaluation.\n"

    # A row for each metric
    standard = published.scores["standard"]
    intervals = published.scores.get("intervals", {})
    meta = published.scores["meta"]
    lines = ["## Scores", "", "| metric | value | 95 % interval |", "|---|---|---|"]
    for name, title in _SHOWN.items():
        value = standard.get(name)
        if not isinstance(value, float | int):
            continue
        low_high = intervals.get(name)
        interval = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else ""
        lines.append(f"| {title} | {value:.3f} | {interval} |")

    # How they came about
    lines += [
        "",
        f"Protocol: split `{meta.get('split')}` of `{meta.get('dataset')}` "
        f"({standard.get('num_images')} photos, {meta.get('num_queries')} queries, fingerprint "
        f"`{str(meta.get('data_fingerprint'))[:12]}`), "
        f"{meta.get('queries_per_annotation')} wording a question, "
        f"answers as {meta.get('answer_format')}, masks measured at the size of the photo, "
        f"at most {meta.get('max_new_tokens')} new tokens, seed {meta.get('seed')}. Scores are "
        "fractions (CIDEr from 0 to 10), intervals are a bootstrap over videos. `metrics.json` has "
        "all of them.",
    ]
    return "\n".join([*lines, ""])
