"""The page: a model in the browser, mounted over the routes of a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from annexe.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from annexe.inference.page.clip_view import AskVideo
    from annexe.inference.results import Photo, PhotoResult

MAX_UPLOAD = "1gb"  # of a photo or video


def mount(
    app: FastAPI,
    ask: Callable[[Photo], PhotoResult | UserError],
    about: dict[str, Any],
    ask_video: AskVideo | None = None,
) -> FastAPI:
    """Put the page at ``/`` of an app, behind the routes that it has; later ones are not reached.

    Args:
        app: the server.
        ask: answers a photo. It is called from several threads at once and may block.
        about: what there is to know of the model; see `Predictor`.
        ask_video: answers a video (default: with ``ask``, frame by frame).

    Returns:
        The app.

    Raises:
        UserError: if Gradio is not installed.
    """
    # Gradio reads this when it is imported, and would report every start otherwise
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f'the page needs Gradio ({error}); install it with pip install "annexe[page]"'
        ) from None
    from annexe.inference.page.layout import build_page
    from annexe.inference.page.style import CSS, HEAD, theme

    return gradio.mount_gradio_app(
        app,
        build_page(ask, about, ask_video),
        path="/",
        theme=theme(),
        css=CSS,
        head=HEAD,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
    )
