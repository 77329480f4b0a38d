"""Masks of an answer as files: PNG pictures, run lengths, and an annotation file of COCO."""

from __future__ import annotations

import json
import re
from io import BytesIO
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
from PIL import Image

from annexe.evaluation.records import line_of
from annexe.inference.results import Answer, GroundedTarget, PhotoResult
from annexe.rle import area

_MAX_NAME = 40  # characters of a phrase in a file's name


def png_zip(answer: Answer) -> bytes:
    """A ZIP file with a PNG for every mask: 8 bits, at the size of the photo, 255 inside."""
    content = BytesIO()
    with ZipFile(content, "w", ZIP_DEFLATED) as archive:
        for target in answer.targets:
            picture = BytesIO()
            Image.fromarray(target.mask.astype(np.uint8) * 255).save(picture, "PNG")
            archive.writestr(png_name(target), picture.getvalue())
    return content.getvalue()


def png_name(target: GroundedTarget) -> str:
    """Name of a mask's PNG: its slot, and its phrase as far as file names may hold it."""
    phrase = re.sub(r"\W+", "_", target.phrase).strip("_")[:_MAX_NAME]
    return f"{target.slot}_{phrase or 'target'}.png"


def rle_json(result: PhotoResult) -> bytes:
    """The lines of predictions.jsonl about a photo, as the server's ``/v1/predict`` gives them."""
    records = [json.loads(line_of(record)) for record in result.to_records()]
    return _json({"records": records})


def coco_json(result: PhotoResult) -> bytes:
    """The masks of all answers about a photo, as an annotation file of COCO.

    Every phrase is a category. The question and the score are further keys of an annotation, which
    programs that read COCO pass over.
    """
    # The photo
    height, width = result.size
    photo = {"id": 1, "file_name": _file_name(result), "width": width, "height": height}

    # Its masks
    categories: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    for answer in result.answers:
        for target in answer.targets:
            left, top, right, bottom = target.box
            name = target.phrase or "target"
            annotation = {
                "id": len(annotations) + 1,
                "image_id": photo["id"],
                "category_id": categories.setdefault(name, len(categories) + 1),
                "segmentation": target.rle,
                "area": area([target.rle]),
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "score": target.score,
                "question": answer.question,
            }
            annotations.append(annotation)

    # The file
    names = [{"id": number, "name": name} for name, number in categories.items()]
    return _json({"images": [photo], "categories": names, "annotations": annotations})


def _file_name(result: PhotoResult) -> str:
    """Name of the photo's file, or of the photo where it has none."""
    image = result.source.image
    return result.name if isinstance(image, Image.Image) else image.name


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
