"""The tab for videos: a clip, a question, and the clip with masks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from annexe.errors import UserError
from annexe.inference.page import fragments
from annexe.inference.page.clip_view import AskVideo, look_at_clip, missing_extra
from annexe.inference.page.uploads import take_as_uploaded

EVERY = 1.0  # seconds from frame to frame


def build_video_tab(ask_video: AskVideo) -> None:
    """Clip and question on one side, the clip with masks on the other.

    Args:
        ask_video: answers a clip.
    """
    missing = missing_extra()
    if missing is not None:
        gr.HTML(fragments.hint(missing), elem_id="video-missing")
        return
    kept = TemporaryDirectory(prefix="annexe-videos-")  # until the process ends

    with gr.Row(equal_height=False):
        # What is asked
        with gr.Column(scale=5, min_width=300):
            clip = gr.Video(label="Video", sources=["upload"], height=300, elem_id="clip")
            take_as_uploaded(clip)
            question = gr.Textbox(
                label="Question",
                placeholder="Which object is in use?",
                lines=1,
                max_lines=3,
                elem_id="clip-question",
            )
            every = gr.Number(
                EVERY, label="Ask every so many seconds", step=0.5, elem_id="clip-every"
            )
            button = gr.Button("Ask about the video", variant="primary", elem_id="clip-ask")

        # What the model says
        with gr.Column(scale=7, min_width=300):
            start = fragments.hint("The video with its masks appears here.")
            message = gr.HTML(start, elem_id="clip-message")
            with gr.Column(visible=False, elem_id="clip-result") as shown:
                video = gr.Video(show_label=False, interactive=False, elem_id="clip-video")
                report = gr.HTML(elem_id="clip-report")

    def show(path: str | None, text: str, seconds: float | None) -> dict[Any, Any]:
        try:
            view = look_at_clip(ask_video, path, text, seconds, Path(kept.name))
        except UserError as error:
            line = fragments.message(str(error))
            return {message: gr.HTML(line, visible=True), shown: gr.Column(visible=False)}
        return {
            message: gr.HTML(visible=False),
            shown: gr.Column(visible=True),
            video: str(view.video),
            report: view.report,
        }

    inputs = [clip, question, every]
    outputs = [message, shown, video, report]
    gr.on(
        [button.click, question.submit],
        show,
        inputs,
        outputs,
        concurrency_limit=1,
        api_visibility="private",
    )
