"""Look of the page: Gradio's theme in few colors, and the style of our own pieces."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_FOLDER = Path(__file__).parent
_FONT = ("Inter", "ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")

# Light and dark, as in the report
_PAPER = ("#fafaf8", "#131417")
_CARD = ("#ffffff", "#1b1d21")
_SOFT = ("#f2f2ee", "#23262b")
_RULE = ("#e5e5e0", "#2f3238")
_INK = ("#1d1f23", "#e8e8e6")
_MUTED = ("#62666e", "#9ea2aa")
_STRONG = ("#3a3d44", "#ffffff")  # the main button under the pointer

CSS = (_FOLDER / "page.css").read_text(encoding="utf-8")
HEAD = f"<script>{(_FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"


def theme() -> gr.themes.Base:
    """The colors of the report, and fonts of the reader's system."""
    colors = {
        "body_background_fill": _PAPER,
        "body_text_color": _INK,
        "body_text_color_subdued": _MUTED,
        "block_background_fill": _CARD,
        "block_border_color": _RULE,
        "block_label_background_fill": _CARD,
        "block_label_border_color": _RULE,
        "block_label_text_color": _MUTED,
        "block_title_text_color": _MUTED,
        "border_color_primary": _RULE,
        "input_background_fill": _SOFT,
        "input_placeholder_color": _MUTED,
        "table_even_background_fill": _CARD,
        "table_odd_background_fill": _CARD,
        "table_row_focus": _SOFT,
        "button_primary_background_fill": _INK,
        "button_primary_background_fill_hover": _STRONG,
        "button_primary_text_color": _PAPER,
    }
    settings: dict[str, str] = {"block_border_width": "1px"}
    for name, (light, dark) in colors.items():
        settings[name] = light
        settings[f"{name}_dark"] = dark
    base = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="zinc",
        radius_size="lg",
        font=list(_FONT),
        font_mono=list(_MONO),
    )
    return base.set(**settings)
