"""The page's components, and what happens when somebody asks."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.helpers import Examples

from annexe.errors import UserError
from annexe.inference.page import fragments
from annexe.inference.page.clip_view import AskVideo, ask_frames
from annexe.inference.page.examples import examples_of
from annexe.inference.page.uploads import take_as_uploaded
from annexe.inference.page.video_tab import build_video_tab
from annexe.inference.page.view import Ask, look

NUM_ASKING = 32  # questions at once; the server queues and batches them
MAX_WAITING = 64  # more are turned away
CACHE_SECONDS = 3600  # for which uploads and views are kept


def build_page(ask: Ask, about: dict[str, Any], ask_video: AskVideo | None) -> gr.Blocks:
    """The page with its two tabs. For the arguments see `annexe.inference.page.mount`."""
    cleaning = (CACHE_SECONDS // 6, CACHE_SECONDS)
    with gr.Blocks(
        title="annexe", analytics_enabled=False, delete_cache=cleaning, fill_width=True
    ) as page:
        gr.HTML(fragments.header(about))
        with gr.Tab("Photo"):
            _build_photo_tab(ask, about)
        with gr.Tab("Video"):
            build_video_tab(ask_video or ask_frames(ask, about))
        gr.HTML(fragments.details(about))
    page.queue(default_concurrency_limit=NUM_ASKING, max_size=MAX_WAITING)
    return page


def _build_photo_tab(ask: Ask, about: dict[str, Any]) -> None:
    """Photo and question on one side, the answer on the other, examples below."""
    with gr.Row(equal_height=False):
        # What is asked
        with gr.Column(scale=5, min_width=300):
            photo = gr.Image(
                label="Photo",
                sources=["upload", "webcam"],
                type="filepath",
                image_mode=None,
                height=300,
                elem_id="photo",
            )
            take_as_uploaded(photo)
            question = gr.Textbox(
                label="Question",
                placeholder="Which object is in use?",
                lines=1,
                max_lines=3,
                elem_id="question",
            )
            button = gr.Button("Ask", variant="primary", elem_id="ask")

        # What the model says
        with gr.Column(scale=7, min_width=300):
            start = fragments.hint("Choose a photo and ask a question; the answer appears here.")
            message = gr.HTML(start, elem_id="message")
            with gr.Column(visible=False, elem_id="result") as shown:
                answer = gr.HTML(elem_id="answer")
                with gr.Tabs():
                    with gr.Tab("Masks"):
                        masks = gr.AnnotatedImage(show_label=False, elem_id="masks")
                    with gr.Tab("Depth") as depth_tab:
                        depth = gr.Image(
                            show_label=False,
                            interactive=False,
                            buttons=["download", "fullscreen"],  # not "share", with strangers
                            elem_id="depth",
                        )
                        gr.HTML(fragments.hint("Predicted depth: near is bright, far is dark."))
                downloads = gr.HTML(elem_id="downloads")
                analysis = gr.HTML(elem_id="analysis")
    examples = _build_examples(about, photo, question)

    # By the button, the enter key, or a click on an example
    def show(path: str | None, text: str) -> dict[Any, Any]:
        try:
            view = look(ask, path, text)
        except UserError as error:
            line = fragments.message(str(error))
            return {message: gr.HTML(line, visible=True), shown: gr.Column(visible=False)}
        layers: list[Any] = [*view.masks]
        return {
            message: gr.HTML(visible=False),
            shown: gr.Column(visible=True),
            answer: view.answer,
            masks: gr.AnnotatedImage((view.photo, layers), color_map=view.colors),
            depth_tab: gr.Tab(visible=view.depth is not None),
            depth: view.depth,
            downloads: gr.HTML(view.downloads, visible=bool(view.downloads)),
            analysis: view.analysis,
        }

    inputs = [photo, question]
    outputs = [message, shown, answer, masks, depth_tab, depth, downloads, analysis]
    gr.on([button.click, question.submit], show, inputs, outputs, api_visibility="private")
    if examples is not None:
        examples.load_input_event.then(show, inputs, outputs, api_visibility="private")


def _build_examples(
    about: dict[str, Any], photo: gr.Image, question: gr.Textbox
) -> Examples | None:
    """Photos and questions to try, if the data of the run is there."""
    rows = [list(example) for example in examples_of(about)]
    if not rows:
        return None
    return gr.Examples(rows, [photo, question], elem_id="examples", label="Try one of these")
