"""Learning curves of a run as small inline SVG pictures that follow the page's colours."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

VALIDATION = {
    "grounding/ciou": "cIoU",
    "grounding/t_acc": "T-acc",
    "grounding/n_acc": "N-acc",
    "answer/exact_match_targets": "Exact match, targets",
    "analysis/cider": "Analysis CIDEr",
    "answer/cider": "Answer CIDEr",
}
MAX_POINTS = 300
LOG_SCALE_RATIO = 8

# Stand-ins that matplotlib can draw with; in the SVG they become the page's own variables.
LINE, GRID, TEXT = "#010203", "#010204", "#010205"
CSS_VARIABLES = {LINE: "var(--accent)", GRID: "var(--rule)", TEXT: "var(--muted)"}


@dataclass(frozen=True)
class Panel:
    """One curve with its title and the number worth reading."""

    title: str
    note: str
    svg: Markup


def read_curves(log: Path) -> dict[str, list[Panel]]:
    """Heading -> panels of a ``log.jsonl``; headings without any record are left out."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a running job may be writing the last
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    terms = sorted({key for record in train for key in record if key.startswith("loss/")})
    losses = {"loss": "Total, weighted"} | {
        key: key[5:].replace("_", " ").capitalize() for key in terms
    }
    headings = {
        "Training loss": [_panel(train, key, title, is_loss=True) for key, title in losses.items()],
        "Validation": [
            _panel(validation, key, title, is_loss=False) for key, title in VALIDATION.items()
        ],
    }
    present = {name: [panel for panel in panels if panel] for name, panels in headings.items()}
    return {name: panels for name, panels in present.items() if panels}


def _panel(records: list[dict], key: str, title: str, *, is_loss: bool) -> Panel | None:
    points = np.array(
        [(record["step"], record[key]) for record in records if key in record], dtype=float
    )
    if not len(points):
        return None
    steps, values = points.T
    wide = is_loss and values.min() > 0 and values.max() > LOG_SCALE_RATIO * values.min()
    note = f"{values[-1]:.3g}" if is_loss else f"{values[-1]:.3f} / {values.max():.3f}"
    svg = _draw(_thin(steps), _thin(values), salt=key, log_scale=wide)
    label = f"{title} over steps {steps[0]:.0f} to {steps[-1]:.0f}, {'last' if is_loss else 'last / best'} {note}"
    return Panel(title + (" (log scale)" if wide else ""), note, _inline(svg, label))


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of ``MAX_POINTS`` runs of neighbours, where there are more values than that."""
    parts = np.array_split(values, min(len(values), MAX_POINTS))
    return np.array([part.mean() for part in parts])


def _draw(steps: np.ndarray, values: np.ndarray, *, salt: str, log_scale: bool) -> str:
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8, "axes.linewidth": 0.8}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.1, 1.65))
        axes = figure.add_axes((0.12, 0.15, 0.85, 0.81))
        marker = "o" if len(steps) <= 20 else None
        axes.plot(
            steps, values, color=LINE, linewidth=1.5, marker=marker, markersize=2.5, clip_on=False
        )
        axes.plot(steps[-1:], values[-1:], color=LINE, marker="o", markersize=4, clip_on=False)
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=min(0, values.min()), top=max(values.max() * 1.08, 1e-3))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_step_text))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(which="both", length=0, colors=TEXT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue()


def _step_text(step: float, _: int) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _inline(svg: str, label: str) -> Markup:
    """Cut an SVG file down to what a page needs, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[a-z0-9._]+">', "<g>", svg)  # ids that every matplotlib picture shares
    svg = re.sub(r"\s+", " ", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg[^>]*>", "", svg, count=1)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup('<svg role="img" aria-label="{}" ').format(label) + Markup(f"{view_box}>{svg}")
