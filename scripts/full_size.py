"""Makes a data root as large as Ego-IRGBench, for measurements.

It has 20,504 images with 1.6 million queries; their pixels are links to a few drawn scenes.
`python scripts/full_size.py OUT` takes half a minute and 230 MB of disk. `--predictions N` also
writes OUT/predictions.jsonl: N queries of split test, answered with the true masks moved by some
pixels; some are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annexe.datasets.image_names import CATEGORIES
from annexe.datasets.pixels import read_id_map
from annexe.rle import Rle, encode
from annexe.synthetic.language import easy_annotations
from annexe.synthetic.render import render
from annexe.synthetic.scene import Scene, draw_scene
from annexe.terminal import track

NUM_IMAGES = 20_504
NUM_SCENES = 8
FRAMES = 7  # of a video
NUM_ROOMS = 47
NUM_INSTANCES = 30  # of each category
SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the frames
ENDINGS = {"RGB": ".jpg", "depth": ".png", "mask": ".png"}
WRONG_ANSWER = "The mask of the mug is <MSK_0>."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    help = "queries to predict"
    parser.add_argument("--predictions", type=int, default=0, metavar="N", help=help)
    arguments = parser.parse_args()
    write_images(arguments.out)
    if arguments.predictions:
        write_predictions(arguments.out, arguments.predictions)


def write_images(root: Path) -> None:
    """Write the data root: scenes, links to their pixels, annotations of their own."""
    folders = ["scenes", *ENDINGS, *(f"dataset_split/{split}" for split in SPLITS)]
    for folder in folders:
        (root / folder).mkdir(parents=True)
    scenes = [draw(root / "scenes", index) for index in range(NUM_SCENES)]

    rng = np.random.default_rng(0)
    for index in track(range(NUM_IMAGES), "writing"):
        stem = stem_of(index)
        scene_index = index % NUM_SCENES
        for folder, ending in ENDINGS.items():
            source = root / "scenes" / f"{scene_index}-{folder}{ending}"
            os.link(source, root / folder / f"{stem}{ending}")
        split = rng.choice(list(SPLITS), p=list(SPLITS.values()))
        questions = np.random.default_rng(index)
        entries = easy_annotations(scenes[scene_index], questions, allow_held_out=True)
        (root / "dataset_split" / split / f"{stem}.json").write_text(json.dumps(entries))


def draw(folder: Path, index: int) -> Scene:
    """Draw a scene and write its photo, depth map and id map."""
    rng = np.random.default_rng(index)
    scene = draw_scene(rng, unseen_pair=False)
    picture = render(scene, rng)
    for kind, pixels in (("RGB", picture.image), ("depth", picture.depth), ("mask", picture.ids)):
        cv2.imwrite(str(folder / f"{index}-{kind}{ENDINGS[kind]}"), pixels)
    return scene


def stem_of(index: int) -> str:
    """A name of HOI4D's pattern."""
    video, frame = divmod(index, FRAMES)
    category = list(CATEGORIES)[video % len(CATEGORIES)]
    instance = video // len(CATEGORIES) % NUM_INSTANCES + 1
    room = video % NUM_ROOMS + 1
    layout = video // NUM_ROOMS % 5 + 1
    task = video // 480 + 1
    return (
        f"ZY2021080000{video % 4 + 1}_H{video % 9 + 1}_C{category:02d}_N{instance:02d}"
        f"_S{room:03d}_s{layout:02d}_T{task}_{frame * 40:05d}"
    )


def write_predictions(root: Path, num_queries: int) -> None:
    """Write predictions of the first queries of split test."""
    num_left = num_queries
    with (root / "predictions.jsonl").open("w") as file:
        for record in predictions(root):
            file.write(json.dumps(record) + "\n")
            num_left -= record["kind"] == "query"
            if num_left == 0:
                break


def predictions(root: Path) -> Iterator[dict[str, Any]]:
    """Records of every image of split test and of every question about it."""
    rng = np.random.default_rng(1)
    id_maps: dict[int, np.ndarray] = {}  # by scene
    moved: dict[tuple[int, int, int], Rle] = {}  # scene, pixels, id -> mask
    for path in sorted((root / "dataset_split" / "test").glob("*.json")):
        stem = path.stem
        id_map = root / "mask" / f"{stem}.png"
        scene = os.stat(id_map).st_ino  # links of a scene share it
        if scene not in id_maps:
            id_maps[scene] = read_id_map(id_map)
        entries = json.loads(path.read_text())
        analysis = entries[0]["caption"]
        yield {"kind": "image", "image": stem, "analysis": analysis, "depth": None}
        for index, entry in enumerate(entries):
            for question in entry["questions"]:
                # Nine in ten of the true masks, moved by some pixels
                shift = int(rng.integers(0, 40))
                masks = []
                for slot, mask_id in enumerate(entry["masks_idx"]):
                    if mask_id and rng.random() < 0.9:
                        key = (scene, shift, mask_id)
                        if key not in moved:
                            moved[key] = encode(np.roll(id_maps[scene] == mask_id, shift, axis=1))
                        phrase = entry["tokens"][slot]
                        mask = {"slot": slot, "phrase": phrase, "score": 0.9, "rle": moved[key]}
                        masks.append(mask)

                # Seven in ten of the true answers
                answer = entry["answer"] if rng.random() < 0.7 else WRONG_ANSWER
                yield {
                    "kind": "query",
                    "image": stem,
                    "annotation": index,
                    "query_id": question["id"],
                    "query": question["query"],
                    "answer": answer,
                    "presence": rng.random(),
                    "masks": masks,
                }


if __name__ == "__main__":
    main()
