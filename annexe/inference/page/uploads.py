"""Uploaded files as they are."""

from __future__ import annotations

from typing import Any

import gradio as gr


def take_as_uploaded(component: gr.Image | gr.Video) -> None:
    """Pass a file on as it was uploaded.

    Gradio would open it before, and name what is wrong with it in words of its own.
    """
    as_gradio_does = component.preprocess

    def path_of(payload: Any) -> Any:
        is_file = payload is not None and payload.path is not None
        return payload.path if is_file else as_gradio_does(payload)

    setattr(component, "preprocess", path_of)  # noqa: B010
