"""The data set: fields as they are on disk, seeded draws, resized and cached pixels, batches."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from annexe import prompts
from annexe.build import build_dataset
from annexe.config import Config
from annexe.datasets import pixels
from annexe.datasets.annotations import read_annotations
from annexe.datasets.collate import Collator, Padding, index_queries, lay_out, pack
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PIXEL_FILES, PixelReader, Pixels
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.structures.batch import ANALYSIS, Batch
from annexe.training.losses import depth_losses
from tests.conftest import SHARED

SIZE = 112
STEM = "ZY20210800001_H1_C11_N07_S185_s02_T2_00104"
MakeParts = Callable[..., tuple[Annexe, TextTokenizer, Batch]]


def annotation(**changes: object) -> dict:
    """A no-frills annotation with the benchmark's fields."""
    questions = [
        {"query": f"Wording {index}?", "is_sentence": 1, "id": index} for index in range(5)
    ]
    return {
        "caption": "The right hand is holding pliers.",
        "answer": "The mask of the right hand is <MSK_0>.",
        "tokens": ["the right hand", "", "", ""],
        "masks_idx": [2, 0, 0],
        "with_mask": 1,
        "questions": questions,
    } | changes


def write_image(
    root: Path, annotations: list[dict], stem: str = STEM, split: str = "train"
) -> None:
    """Write a photo of noise, an id map and a depth map with holes.

    Hand 2 is in the left half, object 1 in the right one.
    """
    random = np.random.default_rng(5)
    ids = np.zeros((108, 192), np.uint8)
    ids[20:90, 10:80] = 2
    ids[30:70, 100:170] = 1
    depth = random.integers(300, 60000, (108, 192)).astype(np.uint16)
    depth[:12] = 0
    depth[random.random(depth.shape) < 0.2] = 0
    photo = random.integers(0, 255, (108, 192, 3), dtype=np.uint8)
    arrays = {"RGB": photo, "depth": depth, "mask": ids}
    for folder, ending in PIXEL_FILES:
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[folder]).save(root / folder / f"{stem}{ending}")
    (root / "dataset_split" / split).mkdir(parents=True, exist_ok=True)
    (root / "dataset_split" / split / f"{stem}.json").write_text(json.dumps(annotations))


def open_set(root: Path, split: str = "train", seed: int = 0, **settings: object) -> EgoIRGBench:
    return EgoIRGBench(
        split, SIZE, seed, root.with_name(f"{root.name}-cache"), data_root=str(root), **settings
    )


# Annotations


def test_fields(tmp_path: Path) -> None:
    both = annotation(
        answer="The mask of the right hand is <MSK_0>, and the mask of the pliers is <MSK_1>.",
        tokens=["the right hand", "the pliers", "", ""],
        masks_idx=[2, 1, 0],
    )
    write_image(tmp_path, [both])
    dataset = open_set(tmp_path)
    sample = dataset[0, 0]
    assert len(dataset) == 1 and dataset.stems == [sample.stem] == [STEM]
    assert (sample.image.shape, sample.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (sample.depth.shape, sample.depth.dtype) == ((SIZE, SIZE), np.float32)
    assert (sample.target_ids.shape, sample.target_ids.dtype) == ((SIZE, SIZE), np.uint8)
    assert sample.original_size == (108, 192)
    assert sample.analysis == "The right hand is holding pliers."
    assert sample.object_phrases == {2: "the right hand", 1: "the pliers"}
    (turn,) = sample.turns
    assert (turn.annotation, turn.answer, turn.slot_ids) == (0, both["answer"], [2, 1, 0])
    assert turn.query == f"Wording {turn.query_id}?"


def test_annotations_of_an_image_are_their_own(tmp_path: Path) -> None:
    """In the released code all annotations of an image are the last one."""
    answers = [f"Answer {index}." for index in range(4)]
    masks = [[2, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0]]
    entries = [annotation(answer=a, masks_idx=m) for a, m in zip(answers, masks, strict=True)]
    write_image(tmp_path, entries)
    dataset = open_set(tmp_path)
    assert [a.answer for a in dataset.annotations[0]] == answers
    assert len({id(a.questions) for a in dataset.annotations[0]}) == 4
    turns = sorted(dataset[0, 0].turns, key=lambda turn: turn.annotation)
    assert [(turn.annotation, turn.answer, turn.slot_ids) for turn in turns] == list(
        zip(range(4), answers, masks, strict=True)
    )


def test_flags_ids_and_lengths_may_vary(tmp_path: Path) -> None:
    no_target = annotation(
        answer=prompts.NO_TARGET_ANSWER,
        tokens=["none"],
        masks_idx=[0],
        with_mask=False,
        questions=[{"query": "Any mug?", "is_sentence": False, "id": "q-7"}],
    )
    bare = annotation(
        answer="The right hand is in use, its mask is <MSK>.",
        tokens=["the right hand"],
        with_mask=True,
    )
    fourth = annotation(tokens=["", "", "", "the pliers"], masks_idx=[0, 0, 0, 1])
    write_image(tmp_path, [no_target, bare, fourth])
    none, hand, object_ = open_set(tmp_path).annotations[0]
    assert (none.with_mask, none.slots, none.questions[0]["id"]) == (False, {}, "q-7")
    assert (hand.with_mask, hand.slots, hand.phrase(0), hand.phrase(3)) == (
        True,
        {0: 2},
        "the right hand",
        "",
    )
    assert hand.answer == "The right hand is in use, its mask is <MSK_0>."
    assert (object_.slots, object_.phrase(3), object_.questions[4]["id"]) == (
        {3: 1},
        "the pliers",
        4,
    )
    turns = {turn.annotation: turn for turn in open_set(tmp_path)[0, 0].turns}
    assert turns[0].query_id == "q-7" and turns[2].slot_ids == [0, 0, 0, 1]


def test_absent_splits(tmp_path: Path) -> None:
    write_image(tmp_path, [annotation()], split="test")
    assert len(open_set(tmp_path, "test")) == 1
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"split '{split}' has no files"):
            open_set(tmp_path, split)


def test_answer_format_phrases(tmp_path: Path) -> None:
    tokens = ["the right hand", "the active pliers", "", ""]
    both = annotation(tokens=tokens, masks_idx=[2, 1, 0])
    write_image(tmp_path, [both])
    (turn,) = open_set(tmp_path, answer_format="phrases")[0, 0].turns
    assert turn.answer == "the right hand and the active pliers"
    (turn,) = open_set(tmp_path)[0, 0].turns
    assert turn.answer == both["answer"]


@pytest.mark.parametrize(
    ("phrase", "group"),
    [
        # Hands, and which
        ("the right hand", "right_hand"),
        ("Left hand", "left_hand"),
        ("the left hand.", "left_hand"),
        ("my right hand", "right_hand"),
        ("the right hand of the person", "right_hand"),
        ("the person\N{RIGHT SINGLE QUOTATION MARK}s left hand", "left_hand"),
        ("the left hand holding the mug", "left_hand"),
        ("the right hand that touches a lamp", "right_hand"),
        ("left-hand", "left_hand"),
        ("Left_Hand", "left_hand"),
        ("RightHand", "right_hand"),
        ("left hand (active)", "left_hand"),
        ("both hands", "hand"),
        ("the left and right hands", "hand"),
        ("the hand on the left", "hand"),
        # Objects with a hand in their phrase
        ("the active trash can interacting with right hand", "trash_can"),
        ("the mug in the left hand", "mug"),
        ("the left hand's mug", "mug"),
        ("the cup of the right hand", "other"),
        ("the right-handed scissors", "scissors"),
        ("the right hand side", "other"),
        ("the handle of the mug", "mug"),
        # Whole words, of what the phrase is about
        ("the clamp", "other"),
        ("a lampshade", "other"),
        ("the safety scissors", "scissors"),
        ("the bowling ball", "other"),
        ("the bottle left of the mug", "bottle"),
        ("the cloth on the chair", "other"),
        ("two knives", "knife"),
        ("a pair of scissors", "scissors"),
        ("ToyCar", "toy_car"),
        ("trashcan", "trash_can"),
        ("the table", "other"),
        # Phrases that name no kind of object: the stem says C11
        ("the object of the left hand", "pliers"),
        ("the active object", "pliers"),
        ("", "pliers"),
    ],
)
def test_label(phrase: str, group: str, scenes: Path) -> None:
    assert open_set(scenes).label(STEM, phrase) == group


def test_label_without_a_category(scenes: Path) -> None:
    dataset = open_set(scenes)
    assert dataset.label("photo", "the object") == "other"
    assert dataset.label(STEM.replace("C11", "C14"), "the can") == "trash_can"
    assert dataset.label(STEM, "the can") == "other"


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        (
            "The right hand of the person is in interaction, its mask is <MSK>.",
            {0: "The right hand of the person"},
        ),
        (
            "The mask of right hand is <MSK_0>, the mask of trash can is <MSK_1>.",
            {0: "right hand", 1: "trash can"},
        ),
        (
            "The mask of the right hand is <MSK_0>, and the mask of the active laptop interacting "
            "with right hand is <MSK_1>.",
            {0: "the right hand", 1: "the active laptop interacting with right hand"},
        ),
        (
            "The mask of the mug is <MSK_0> and the mask of the sand bucket is <MSK_2>.",
            {0: "the mug", 2: "the sand bucket"},
        ),
        (
            "The hand and the mug are in interaction, their mask is <MSK_1>.",
            {1: "The hand and the mug"},
        ),
        ("The mug is <MSK_3>.", {3: "The mug"}),
        (
            "The mask of right hand is <MSK>, the mask of trash can is <MSK>.",
            {0: "right hand", 1: "trash can"},
        ),
        (
            "The mask of the mug is <MSK>, the mask of the hand is <MSK_0>.",
            {0: "the hand", 1: "the mug"},
        ),
        ("<MSK_0>", {0: ""}),
        (prompts.NO_TARGET_ANSWER, {}),
        ("", {}),
    ],
)
def test_phrases_of_an_answer(answer: str, phrases: dict[int, str]) -> None:
    assert prompts.phrases_of(answer) == phrases


# Draws


def test_wordings_are_drawn_anew_every_epoch(scenes: Path) -> None:
    """Every (seed, epoch, stem) has a draw of its own.

    The released code draws a query once, when it loads.
    """

    def drawn(dataset: EgoIRGBench, epoch: int) -> list[tuple]:
        return [(turn.annotation, turn.query_id) for turn in dataset[epoch, 0].turns]

    dataset = open_set(scenes)
    epochs = [drawn(dataset, epoch) for epoch in range(5)]
    assert epochs == [drawn(open_set(scenes), epoch) for epoch in range(5)]
    assert len({str(epoch) for epoch in epochs}) == 5
    assert drawn(open_set(scenes, seed=1), 0) != epochs[0]


def test_a_draw_does_not_depend_on_the_other_images(scenes: Path, tmp_path: Path) -> None:
    dataset = open_set(scenes)
    stem = dataset.stems[4]
    shutil.copytree(scenes, tmp_path / "less")
    for path in (tmp_path / "less" / "dataset_split" / "train").iterdir():
        if path.stem != stem:
            path.unlink()
    assert open_set(tmp_path / "less")[3, 0].turns == dataset[3, 4].turns


@pytest.mark.parametrize("num_queries", [1, 3, 50])
def test_queries_per_image(num_queries: int, scenes: Path) -> None:
    dataset = open_set(scenes, queries_per_image=num_queries)
    for index in range(len(dataset)):
        drawn = [turn.annotation for turn in dataset[0, index].turns]
        assert len(set(drawn)) == len(drawn) == min(num_queries, len(dataset.annotations[index]))


def test_every_annotation_and_wording_is_drawn_at_last(scenes: Path) -> None:
    dataset = open_set(scenes, queries_per_image=2)
    seen = set()
    for epoch in range(400):
        seen.update((turn.annotation, turn.query_id) for turn in dataset[epoch, 0].turns)
    expected = set()
    for index, image_annotation in enumerate(dataset.annotations[0]):
        expected.update((index, question["id"]) for question in image_annotation.questions)
    assert seen == expected


def test_evaluation_asks_about_every_annotation(scenes: Path) -> None:
    dataset = open_set(scenes, "test")
    once = dataset.evaluation_sample(0)
    both = dataset.evaluation_sample(0, 2)
    assert [turn.annotation for turn in once.turns] == list(range(len(dataset.annotations[0])))
    assert both.turns[::2] == once.turns
    assert len({turn.query_id for turn in both.turns}) == 2 * len(once.turns)
    assert once.turns == open_set(scenes, "test").evaluation_sample(0).turns


# Pixels


def nearest(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).resize((SIZE, SIZE), Image.Resampling.NEAREST))


def test_photo_depth_and_ids_are_resized_together(tmp_path: Path) -> None:
    write_image(tmp_path, [annotation()])
    ids = np.asarray(Image.open(tmp_path / "mask" / f"{STEM}.png"))
    photo = np.where(ids[..., None] == 2, 255, 0).astype(np.uint8).repeat(3, axis=2)
    Image.fromarray(photo).save(tmp_path / "RGB" / f"{STEM}.jpg", quality=95)
    sample = open_set(tmp_path)[0, 0]
    np.testing.assert_array_equal(sample.target_ids, nearest(tmp_path / "mask" / f"{STEM}.png"))
    bright = sample.image.mean(2) > 127
    is_hand = sample.target_ids == 2
    assert (bright == is_hand).mean() > 0.99


def test_no_distance_is_invented(tmp_path: Path) -> None:
    write_image(tmp_path, [annotation()])
    sample = open_set(tmp_path)[0, 0]
    original = np.asarray(Image.open(tmp_path / "depth" / f"{STEM}.png"))
    np.testing.assert_array_equal(
        sample.depth, nearest(tmp_path / "depth" / f"{STEM}.png").astype(np.float32)
    )
    assert set(np.unique(sample.depth)) <= set(np.unique(original).astype(np.float32))
    assert (sample.depth[:12] == 0).all() and 0.2 < (sample.depth == 0).mean() < 0.5


def test_invalid_depth_is_left_out(tmp_path: Path) -> None:
    """Invalid pixels change nothing, and an image of them alone is fine.

    The released code trains on them.
    """
    write_image(tmp_path, [annotation()])
    Image.fromarray(np.zeros((108, 192), np.uint16)).save(tmp_path / "depth" / f"{STEM}.png")
    sample = open_set(tmp_path)[0, 0]
    assert (sample.depth == 0).all()

    def total(predicted: Tensor, depth: Tensor) -> Tensor:
        return depth_losses(SimpleNamespace(depth=predicted), SimpleNamespace(depth=depth)).sum()

    predicted = torch.rand(1, SIZE, SIZE)
    assert total(predicted, torch.from_numpy(sample.depth)[None]) == 0
    half = 500.0 + torch.arange(SIZE * SIZE).view(1, SIZE, SIZE)
    half[:, : SIZE // 2] = 0
    other = predicted.clone()
    other[:, : SIZE // 2] += 7
    assert total(predicted, half) == total(other, half) > 0


def same(one: Pixels, other: Pixels) -> bool:
    names = ("image", "depth", "target_ids", "present_ids")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
    return (
        equal and one.original_size == other.original_size and one.depth.dtype == other.depth.dtype
    )


@pytest.fixture
def reader(tmp_path: Path) -> PixelReader:
    write_image(tmp_path, [annotation()])
    return PixelReader(tmp_path, SIZE, tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the images that were decoded; it grows as more are."""
    paths: list[Path] = []
    read_image = pixels.read_image

    def recording(path: Path, *arguments: object, **options: object) -> Image.Image:
        paths.append(path)
        return read_image(path, *arguments, **options)

    monkeypatch.setattr(pixels, "read_image", recording)
    return paths


def entry_of(reader: PixelReader) -> Path:
    (entry,) = reader.cache_dir.glob("*.safetensors")
    return entry


def test_second_read_decodes_nothing(reader: PixelReader, decoded: list[Path]) -> None:
    plain = PixelReader(reader.root, SIZE, None).read(STEM, {1, 2})
    decoded.clear()
    cold = reader.read(STEM, {1, 2})
    assert len(decoded) == 3
    warm = reader.read(STEM, {1, 2})
    assert len(decoded) == 3
    assert same(plain, cold) and same(cold, warm)
    names = [path.name for path in reader.cache_dir.iterdir()]
    assert names == [f"{STEM}.safetensors"], "parts are left behind"


@pytest.mark.parametrize("which", [0, 1, 2], ids=["photo", "depth", "mask"])
def test_cache_follows_its_source_files(
    which: int, reader: PixelReader, decoded: list[Path]
) -> None:
    before = reader.read(STEM, ())
    path = reader.files(STEM)[which]
    stat = path.stat()
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    after = reader.read(STEM, ())
    assert len(decoded) == 6 and not same(before, after)
    assert same(after, reader.read(STEM, ())) and len(decoded) == 6


def test_damaged_cache_entry_is_made_again(reader: PixelReader) -> None:
    good = reader.read(STEM, ())
    entry = entry_of(reader)
    content = entry.read_bytes()
    random = np.random.default_rng(0)
    damaged = [b"", b"PK\x03\x04", b"no archive"]
    for length in random.integers(len(content), size=20):
        damaged.append(content[: int(length)])
    for position in random.integers(len(content), size=200):
        flipped = bytes([content[position] ^ 0x41])
        damaged.append(content[:position] + flipped + content[position + 1 :])
    for case, wrong in enumerate(damaged):
        entry.write_bytes(wrong)
        assert same(reader.read(STEM, ()), good), case


def test_sizes_and_roots_do_not_share_entries(reader: PixelReader, tmp_path: Path) -> None:
    reader.read(STEM, ())
    smaller = PixelReader(reader.root, 56, tmp_path / "cache").read(STEM, ())
    assert smaller.image.shape == (56, 56, 3)
    shutil.copytree(reader.root / "RGB", tmp_path / "b" / "RGB")
    other = PixelReader(tmp_path / "b", SIZE, tmp_path / "cache")
    assert other.cache_dir != reader.cache_dir


def _fill(reader: PixelReader, ids: tuple[int, ...]) -> Pixels:
    for _ in range(20):
        filled = reader.read(STEM, ids)
        entry = reader.cache_dir / f"{STEM}.safetensors"
        entry.unlink(missing_ok=True)
    return filled


def test_processes_may_fill_one_cache_together(reader: PixelReader) -> None:
    jobs = [(reader, (1, 2))] * 2
    with get_context("fork").Pool(2) as pool:
        one, other = pool.starmap(_fill, jobs, chunksize=1)
    assert same(one, other)
    assert not list(reader.cache_dir.glob("*.part"))
    assert same(reader.read(STEM, ()), one)


# Batches


def test_batch_holds_slots_and_images_of_queries(make_config: Callable[..., Config]) -> None:
    dataset = build_dataset(make_config(), "train")
    tokenizer = train_tokenizer(dataset.texts(), num_slots=2)
    samples = [dataset[0, index] for index in range(3)]
    batch = Collator(tokenizer, 16, num_slots=2)(samples)
    turns = [turn for sample in samples for turn in sample.turns]
    num_queries = [len(sample.turns) for sample in samples]
    assert batch.queries.image_index.tolist() == np.arange(3).repeat(num_queries).tolist()
    assert batch.slot_ids.tolist() == [[*turn.slot_ids, 0, 0][:2] for turn in turns]
    assert batch.images.shape == (3, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    np.testing.assert_array_equal(batch.images[1].permute(1, 2, 0), samples[1].image)
    np.testing.assert_array_equal(batch.depth[2], samples[2].depth)
    np.testing.assert_array_equal(batch.target_ids[0], samples[0].target_ids)


def test_labels_are_on_responses_and_eos_alone(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    text = batch.text
    responses = []
    for sample in batch.samples:
        responses.append((True, sample.analysis))
        responses += [(False, turn.answer) for turn in sample.turns]
    labels = iter(text.labels.tolist())
    is_analysis = []
    for of_analysis, response in responses:
        ids = [*tokenizer.encode(response), tokenizer.eos_id]
        assert [next(labels) for _ in ids] == ids
        is_analysis += [of_analysis] * len(ids)
    assert next(labels, None) is None
    assert text.is_analysis.tolist() == is_analysis

    # A label is the next token of the same branch
    flat_ids = text.input_ids.flatten()
    flat_segments = text.segment_ids.flatten()
    here = text.label_positions
    assert torch.equal(flat_ids[here + 1], text.labels)
    assert torch.equal(flat_segments[here + 1], flat_segments[here])
    assert torch.equal(flat_segments[here] == ANALYSIS, text.is_analysis)


def test_branches_start_where_the_prefix_ends(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    text = batch.text
    prefix = tokenizer.prefix_ids
    start = text.prefix_length
    for row in range(len(batch.samples)):
        assert text.input_ids[row, : text.image_start].tolist() == prefix
        assert text.position_ids[row, :start].tolist() == list(range(start))
        for branch in range(ANALYSIS, int(text.segment_ids[row].max()) + 1):
            positions = text.position_ids[row, text.segment_ids[row] == branch]
            assert positions.tolist() == list(range(start, start + len(positions)))


def test_prompts_end_the_sequences_without_responses(make_parts: MakeParts) -> None:
    model, tokenizer, batch = make_parts()
    bare = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    assert len(bare.text.labels) == len(bare.text.label_positions) == 0
    assert torch.equal(bare.text.branch_length, batch.text.branch_length)
    queries = [turn.query for sample in batch.samples for turn in sample.turns]
    text = bare.text
    for query, branch in zip(queries, text.query_branches.tolist(), strict=True):
        start = int(text.branch_start[branch])
        end = start + int(text.branch_length[branch])
        prompt = text.input_ids[text.branch_image_index[branch], start:end].tolist()
        assert prompt == tokenizer.encode(tokenizer.template.query_prompt(query))


def test_object_phrases_in_a_batch(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    for row, sample in enumerate(batch.samples):
        ids = [mask_id for mask_id in batch.object_ids[row].tolist() if mask_id]
        words = [tokens[tokens >= 0].tolist() for tokens in batch.object_words[row]]
        expected = {}
        for mask_id, phrase in sample.object_phrases.items():
            expected[mask_id] = tokenizer.encode(phrase)
        assert dict(zip(ids, words, strict=False)) == expected


def random_branches(random: np.random.Generator) -> list[list[tuple[list[int], list[int]]]]:
    """Prompts and responses of some images: an analysis each, and up to four queries."""

    def words(fewest: int) -> list[int]:
        return random.integers(3, 99, random.integers(fewest, 30)).tolist()

    images = []
    for _ in range(random.integers(1, 5)):
        images.append([(words(1), words(0)) for _ in range(random.integers(1, 6))])
    return images


@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("unpad", [False, True])
def test_every_branch_is_found_where_the_batch_says(multiple: int, unpad: bool) -> None:
    random = np.random.default_rng(multiple)
    padding = Padding.to_multiple_of(multiple, unpad=unpad)
    for _ in range(40):
        images = random_branches(random)
        text = pack(images, [1, 2], 16, padding)
        queries, query_mask = index_queries([len(image) - 1 for image in images], padding)
        assert text.prefix_length == 18 and text.image_start == 2
        assert text.input_ids.shape[1] % padding.rows == 0
        assert text.max_branch_length % padding.prompts == 0
        assert len(text.labels) % padding.labels == 0

        # Analyses come first, and query k of an image is its segment k + 2
        is_query = torch.zeros(len(text.branch_start), dtype=torch.bool)
        is_query[text.query_branches] = True
        expected = [image[0] for image in images]
        rows = list(
            zip(text.branch_image_index, text.branch_start, text.branch_length, strict=True)
        )
        for branch, (image_index, start, length) in enumerate(rows):
            if not is_query[branch]:
                prompt, _ = expected[image_index]
                assert text.input_ids[image_index, start : start + length].tolist() == prompt
        for query, branch in enumerate(text.query_branches.tolist()):
            image_index, start, length = (int(value) for value in rows[branch])
            assert image_index == queries.image_index[query]
            if query_mask[query]:
                segment_id = ANALYSIS + 1 + int(queries.index_in_image[query])
                prompt, response = images[image_index][segment_id - ANALYSIS]
                tokens = text.input_ids[image_index, text.segment_ids[image_index] == segment_id]
                assert tokens.tolist() == prompt + response
                assert tokens[:length].tolist() == prompt
                assert text.segment_ids[image_index, start] == segment_id
            else:
                assert (start, length) == (text.prefix_length, 1)

        # Every response is asked for once, branch by branch
        is_label = text.labels != -100
        responses = [response for _, response in itertools.chain(*images)]
        assert text.labels[is_label].tolist() == list(itertools.chain(*responses))
        flat_ids = text.input_ids.flatten()
        here = text.label_positions[is_label]
        assert torch.equal(flat_ids[here + 1], text.labels[is_label])

        # What is no padding
        is_token = text.segment_ids.flatten() >= 0
        if unpad:
            indices = text.unpadded_indices[text.unpadded_indices < is_token.numel()]
            assert torch.equal(indices, is_token.nonzero().flatten())
        else:
            assert text.unpadded_indices is None


def test_without_rounding_nothing_is_filled_in() -> None:
    images = [[([5, 6], [7]), ([8], [9, 9])], [([5], [])]]
    table = lay_out(images, prefix_length=3)
    assert [(b.image_index, b.segment_id, b.start, b.end) for b in table] == [
        (0, 1, 3, 6),
        (0, 2, 6, 9),
        (1, 1, 3, 4),
    ]
    assert [branch.is_query for branch in table] == [False, True, False]
    text = pack(images, [1], 2, Padding())
    assert text.input_ids.tolist() == [
        [1, 0, 0, 5, 6, 7, 8, 9, 9],
        [1, 0, 0, 5, 0, 0, 0, 0, 0],
    ]
    assert text.segment_ids.tolist() == [
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 1, -1, -1, -1, -1, -1],
    ]
    assert text.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 3, 4, 5],
        [0, 1, 2, 3, 0, 0, 0, 0, 0],
    ]
    assert text.label_positions.tolist() == [4, 6, 7] and text.labels.tolist() == [7, 9, 9]
    assert text.max_branch_length == 2


def test_images_with_few_queries_are_filled_up() -> None:
    images = [[([5, 6], [7]), ([8], [9, 9])], [([5], [])]]
    table = lay_out(images, prefix_length=3, fill_queries=True)
    filler = table[-1]
    assert len(table) == 4 and filler.is_query and filler.response == []
    assert (filler.image_index, filler.start, filler.prompt) == (1, 3, [5])


# Real photos


@pytest.mark.skipif(
    not (SHARED / "real_samples").is_dir(), reason="the two real samples are not here"
)
def test_real_samples(tmp_path: Path) -> None:
    root = SHARED / "real_samples"
    dataset = EgoIRGBench("test", SIZE, 0, tmp_path, data_root=str(root))
    assert len(dataset) == 2
    for index, stem in enumerate(dataset.stems):
        sample = dataset.evaluation_sample(index, queries_per_annotation=9)
        num_questions = sum(len(entry.questions) for entry in dataset.annotations[index])
        assert len(sample.turns) == num_questions
        assert (sample.depth == 0).all()
        assert set(sample.object_phrases) == {1, 2} <= set(np.unique(sample.target_ids).tolist())
        assert sample.original_size == Image.open(root / "RGB" / f"{stem}.jpg").size[::-1]
        for turn in sample.turns:
            used = [slot for slot, mask_id in enumerate(turn.slot_ids) if mask_id]
            assert sorted(prompts.phrases_of(turn.answer)) == used
    path = root / "dataset_split" / "test" / f"{dataset.stems[0]}.json"
    hand, both, none = read_annotations(path)
    assert (hand.slots, both.slots, none.slots) == ({0: 2}, {0: 2, 1: 1}, {})
    assert "<MSK_0>" in hand.answer and none.answer == prompts.NO_TARGET_ANSWER
    assert dataset.label(dataset.stems[0], both.phrase(1)) == "trash_can"
