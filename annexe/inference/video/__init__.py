"""Answers about the frames of a clip: read, asked, smoothed, written as lines and as a video."""

from annexe.inference.video.clips import add_arguments, predict_video, run
from annexe.inference.video.reading import is_video, read_frames

__all__ = ["add_arguments", "is_video", "predict_video", "read_frames", "run"]
