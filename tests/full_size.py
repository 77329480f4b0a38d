"""Makes a data root as large as Ego-IRGBench: 20,504 images, 1.6 million queries, pixels linked to a few drawn scenes.

`PYTHONPATH=. python tests/full_size.py OUT` takes half a minute and 230 MB of disk. `--predictions N` also writes
OUT/predictions.jsonl: N queries of split test, answered with the true masks moved by some pixels, some left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from annexe.datasets.image_names import CATEGORIES
from annexe.datasets.pixels import read_id_map
from annexe.rle import encode
from annexe.synthetic.language import easy_annotations
from annexe.synthetic.render import render
from annexe.synthetic.scene import Scene, draw_scene

NUM_IMAGES, NUM_SCENES, FRAMES = 20_504, 8, 7  # FRAMES of a video
ENDINGS = {"RGB": ".jpg", "depth": ".png", "mask": ".png"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--predictions", type=int, default=0, metavar="N", help="queries to predict"
    )
    arguments = parser.parse_args()
    for folder in (
        "scenes",
        *ENDINGS,
        *(f"dataset_split/{split}" for split in ("train", "val", "test")),
    ):
        (arguments.out / folder).mkdir(parents=True)
    scenes = [draw(arguments.out / "scenes", number) for number in range(NUM_SCENES)]
    rng = np.random.default_rng(0)
    for number in track(range(NUM_IMAGES), "writing"):
        stem, number_of_scene = stem_of(number), number % NUM_SCENES
        for folder, ending in ENDINGS.items():
            os.link(
                arguments.out / "scenes" / f"{number_of_scene}-{folder}{ending}",
                arguments.out / folder / f"{stem}{ending}",
            )
        split = rng.choice(
            ["train", "val", "test"], p=[0.7, 0.1, 0.2]
        )  # by frame, as in the published split
        entries = easy_annotations(
            scenes[number_of_scene], np.random.default_rng(number), allow_held_out=True
        )
        (arguments.out / "dataset_split" / split / f"{stem}.json").write_text(json.dumps(entries))
    if arguments.predictions:
        write_predictions(arguments.out, arguments.predictions)


def write_predictions(root: Path, number: int) -> None:
    """Write predictions of the first ``number`` queries of split test."""
    rng, left = np.random.default_rng(1), number
    moved: dict[tuple[int, int, int], dict] = {}  # scene, pixels, id -> RLE
    with (root / "predictions.jsonl").open("w") as file:
        for path in sorted((root / "dataset_split" / "test").glob("*.json")):
            scene = os.stat(root / "mask" / f"{path.stem}.png").st_ino
            ids = None
            entries = json.loads(path.read_text())
            queries = [
                (n, entry, question)
                for n, entry in enumerate(entries)
                for question in entry["questions"]
            ]
            record = {
                "kind": "image",
                "image": path.stem,
                "analysis": entries[0]["caption"],
                "depth": None,
            }
            file.write(json.dumps(record) + "\n")
            for n, entry, question in queries[:left]:
                masks, by = [], int(rng.integers(0, 40))
                for slot, mask_id in enumerate(entry["masks_idx"]):
                    if mask_id and rng.random() < 0.9:
                        if (scene, by, mask_id) not in moved:
                            ids = (
                                read_id_map(root / "mask" / f"{path.stem}.png")
                                if ids is None
                                else ids
                            )
                            moved[scene, by, mask_id] = encode(np.roll(ids == mask_id, by, axis=1))
                        rle = moved[scene, by, mask_id]
                        masks.append(
                            {
                                "slot": slot,
                                "phrase": entry["tokens"][slot],
                                "score": 0.9,
                                "rle": rle,
                            }
                        )
                answer = (
                    entry["answer"] if rng.random() < 0.7 else "The mask of the mug is <MSK_0>."
                )
                record = {
                    "kind": "query",
                    "image": path.stem,
                    "annotation": n,
                    "query_id": question["id"],
                }
                record |= {
                    "query": question["query"],
                    "answer": answer,
                    "presence": rng.random(),
                    "masks": masks,
                }
                file.write(json.dumps(record) + "\n")
            left -= len(queries[:left])
            if left == 0:
                break


def draw(folder: Path, number: int) -> Scene:
    """Draw a scene and write its photo, depth map and id map."""
    rng = np.random.default_rng(number)
    scene = draw_scene(rng, unseen_pair=False)
    picture = render(scene, rng)
    for kind, pixels in (("RGB", picture.image), ("depth", picture.depth), ("mask", picture.ids)):
        cv2.imwrite(str(folder / f"{number}-{kind}{ENDINGS[kind]}"), pixels)
    return scene


def stem_of(number: int) -> str:
    """HOI4D's pattern with FRAMES frames a video, 47 rooms and 30 instances of each category."""
    video, frame = divmod(number, FRAMES)
    category = list(CATEGORIES)[video % len(CATEGORIES)]
    instance, room = video // len(CATEGORIES) % 30 + 1, video % 47 + 1
    layout, task = video // 47 % 5 + 1, video // 480 + 1
    return (
        f"ZY2021080000{video % 4 + 1}_H{video % 9 + 1}_C{category:02d}_N{instance:02d}"
        f"_S{room:03d}_s{layout:02d}_T{task}_{frame * 40:05d}"
    )


if __name__ == "__main__":
    main()
