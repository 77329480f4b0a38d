"""Reader and doctor agree on files with random damages, and neither changes a value in silence.

Every kind of damage is a function that spoils one image of a data root by a random generator. To
add a kind, write such a function, and one that compares what the reader gives with the files, and
add both to `KINDS`. `ANNEXE_DAMAGES=2000` tries that many of annotations, and as many of images.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from annexe import prompts
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.doctor.problems import ERROR
from annexe.doctor.survey import Survey, survey
from annexe.errors import UserError
from annexe.evaluation.records import QueryRecord, line_of, parse
from tests import pixel_damages
from tests.test_datasets import STEM, annotation, write_image

NUM_DAMAGES = int(os.environ.get("ANNEXE_DAMAGES", "100"))


class Damage(NamedTuple):
    """A kind of damage.

    Attributes:
        spoil: changes files of the only image of a data root, and says what it did.
        check: asserts that what the reader gives of the image is what the files say; it also gets
            the codes that the doctor reports.
        share: of `NUM_DAMAGES` that are tried.
    """

    spoil: Callable[[Path, random.Random], str]
    check: Callable[[Path, EgoIRGBench, set[str]], None]
    share: float = 1.0


# What both say of a data root


def read(root: Path) -> EgoIRGBench | UserError:
    """The data set after everything in it was read, or its error."""
    try:
        dataset = EgoIRGBench("train", 56, 0, None, data_root=str(root))
        for index in range(len(dataset)):
            dataset[0, index]
            dataset.evaluation_sample(index, "all")
        dataset.fingerprint()
    except UserError as error:
        return error
    return dataset


def errors_of(found: Survey) -> set[str]:
    return {problem.code for problem in found.problems if problem.severity == ERROR}


# Annotations

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    256,
    2**70,
    0.0,
    1.0,
    1.7,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "12",
    "false",
    "the mug",
    "NaN",
    "\ud800",
    "\ud83d\ude00 and é",
    "a\nb\x00",
    "<MSK> and <MSK> and <MSK_7>",
    [],
    [0],
    [1.0, 2.0],
    ["the mug", None],
    [[1]],
    {},
    {"query": "?", "id": 7},
    [{"query": "?", "id": 7}],
]
NUMBERS = ("1e999", "-0.0", "1E0", "1.0000000000000001", "9" * 5000, "01", "+1", "0x1", "Infinity")


def entries() -> list[dict[str, Any]]:
    """Sound annotations: one with two targets, one with a bare placeholder, one without target."""
    none = {
        "answer": prompts.NO_TARGET_ANSWER,
        "masks_idx": [0],
        "tokens": [""],
        "with_mask": False,
    }
    return [annotation(), annotation(answer="It is <MSK>.", masks_idx=[0, 1]), annotation(**none)]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within a JSON value, with each of its keys or indices."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from places(value[key])


def spoil_values(content: list[Any], rng: random.Random) -> tuple[list[Any], str]:
    """One value of an annotation file replaced, removed, repeated, renamed or moved."""
    content = copy.deepcopy(content)
    holder, key = rng.choice(list(places(content)))
    value = holder[key]
    way = rng.choice(("replace",) * 5 + ("remove", "repeat", "wrap", "text", "swap"))
    if way == "replace":
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif way == "remove":
        del holder[key]
    elif way == "wrap":
        holder[key] = [value]
    elif way == "text":
        holder[key] = json.dumps(value)
    elif way == "swap":
        other, other_key = rng.choice(list(places(content)))
        holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(value)
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    else:
        holder[f"{key}s"] = holder.pop(key)
    return content, f"{way} at {key!r}: {value!r:.40}"


def spoil_bytes(text: str, rng: random.Random) -> tuple[bytes, str]:
    """The bytes of an annotation file cut, changed, or encoded in another way."""
    content = text.encode()
    place = rng.randrange(len(content))
    spoiled = {
        "cut": content[:place],
        "flip": content[:place]
        + bytes([content[place] ^ 1 << rng.randrange(8)])
        + content[place + 1 :],
        "delete": content[:place] + content[place + 1 :],
        "insert": content[:place] + bytes([rng.randrange(256)]) + content[place:],
        "number": text.replace(": 1,", f": {rng.choice(NUMBERS)},", 1).encode(),
        "key twice": text.replace(
            '{"', f'{{"{rng.choice(("answer", "id", "x"))}": 0, "', 1
        ).encode(),
        "key of a question twice": text.replace('"query": ', '"query": "a", "query": ', 1).encode(),
        "twice": content + content,
        "nothing": b"",
        "spaces": b" \n",
        "brackets": b"[" * 100_000,
        "not a list": content[1:-1],
        "utf-8-sig": text.encode("utf-8-sig"),
        "utf-16": text.encode("utf-16"),
        "utf-16-le": text.encode("utf-16-le"),
        "utf-32": text.encode("utf-32"),
        "latin-1": text.replace("mug", "m\xe4g").replace("p", "\xe9").encode("latin-1", "replace"),
        "zero bytes": bytes(len(content)),
    }
    way = rng.choice(sorted(spoiled))
    return spoiled[way], f"{way} at byte {place}"


def spoil_annotations(root: Path, rng: random.Random) -> str:
    """Write an annotation file with one to three damages."""
    content: Any = entries()
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if list(places(content)):
            content, what = spoil_values(content, rng)
            done.append(what)
    text = json.dumps(content)
    spoiled = text.encode()
    if rng.random() < 0.3:
        spoiled, what = spoil_bytes(rng.choice((text, json.dumps(entries()))), rng)
        done.append(what)
    annotation_file(root).write_bytes(spoiled)
    return "; ".join(done)


def annotation_file(root: Path) -> Path:
    return root / "dataset_split" / "train" / f"{STEM}.json"


def check_annotations(root: Path, dataset: EgoIRGBench, codes: set[str]) -> None:
    """Every value that was read equals the value in the file, and has the documented type."""
    content = json.loads(annotation_file(root).read_text(encoding="utf-8-sig"))
    (read_entries,) = dataset.annotations
    assert len(read_entries) == len(content)
    for entry, expected in zip(read_entries, content, strict=True):
        # Texts as they are, but for bare placeholders
        assert is_same(entry.caption, expected["caption"], str)
        if "<MSK>" in expected["answer"]:
            assert "<MSK>" not in entry.answer
            assert bare(entry.answer) == bare(expected["answer"])
        else:
            assert is_same(entry.answer, expected["answer"], str)
        for read_list, name, kind in (
            (entry.tokens, "tokens", str),
            (entry.masks_idx, "masks_idx", int),
        ):
            assert isinstance(expected[name], list)
            for value, written in zip(read_list, expected[name], strict=True):
                assert is_same(value, written, kind)

        # Flags, and wordings with their ids
        assert is_same(entry.with_mask, expected["with_mask"], bool)
        for question, written in zip(entry.questions, expected["questions"], strict=True):
            assert is_same(question["query"], written["query"], str)
            assert is_same(question["id"], written["id"], type(question["id"]))
            assert type(question["id"]) in (int, str)
            assert is_same(question["is_sentence"], written.get("is_sentence", False), bool)
            record = QueryRecord(
                image=STEM, annotation=0, query_id=question["id"], answer=entry.answer, masks=[]
            )
            assert parse(line_of(record)) == record


def bare(answer: str) -> str:
    """An answer without the numbers of its placeholders."""
    return re.sub(r"<MSK_\d+>", "<MSK>", answer)


def is_same(read: Any, written: Any, kind: type) -> bool:
    """Whether a value is of its kind and says what the file does; 1.0 and 1, 1 and true are one."""
    if kind is str:
        return type(read) is str and type(written) is str and read == written
    return type(read) is kind and isinstance(written, bool | int | float) and read == written


KINDS = {
    "annotations": Damage(spoil_annotations, check_annotations),
    "photo": Damage(pixel_damages.spoil_photo, pixel_damages.check_photo, 1 / 3),
    "id map": Damage(pixel_damages.spoil_id_map, pixel_damages.check_id_map, 1 / 3),
    "depth map": Damage(pixel_damages.spoil_depth, pixel_damages.check_depth, 1 / 3),
}


# The test


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with one sound image."""
    root = tmp_path_factory.mktemp("sound") / "data"
    write_image(root, entries())
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_refuses_the_other_reports(kind: str, sound: Path, tmp_path: Path) -> None:
    damage = KINDS[kind]
    num_damages = int(damage.share * NUM_DAMAGES)
    num_refused = 0
    for seed in range(num_damages):
        # A sound image, then a damaged one; times of its own, for an index knows files by them
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(sound, root)
        what = damage.spoil(root, random.Random(f"{kind} {seed}"))
        for path in root.rglob("*.*"):
            os.utime(path, ns=(seed, seed))

        # Both say the same of it
        found = survey(root, 1)
        given = read(root)
        is_refused = isinstance(given, UserError)
        where = f"seed {seed}: {what}; reader: {given}; doctor: {found.problems}"
        assert is_refused == bool(errors_of(found)), where
        if isinstance(given, UserError):
            assert "\n" not in str(given) and len(str(given)) < 500, where
            num_refused += 1
        else:
            damage.check(root, given, {problem.code for problem in found.problems})
    assert 0.2 * num_damages < num_refused < 0.98 * num_damages  # some of either kind


def test_sound_files_are_taken_as_they_are(sound: Path) -> None:
    given = read(sound)
    assert isinstance(given, EgoIRGBench) and not errors_of(survey(sound, 1))
    for damage in KINDS.values():
        damage.check(sound, given, set())
