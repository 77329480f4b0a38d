"""The data set: every field as it is on disk, seeded draws, pixels resized together and cached, batches."""

from __future__ import annotations

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
from annexe.datasets import pixels as transforms
from annexe.datasets.annotations import read_annotations
from annexe.datasets.collate import Collator
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PixelReader, Pixels
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.structures.batch import ANALYSIS, Batch
from annexe.training.losses import depth_total
from tests.conftest import SHARED

SIZE = 112
STEM = "ZY20210800001_H1_C11_N07_S185_s02_T2_00104"
MakeParts = Callable[..., tuple[Annexe, TextTokenizer, Batch]]


def annotation(**changes: object) -> dict:
    """A no-frills annotation with the benchmark's fields."""
    questions = [
        {"query": f"Wording {number}?", "is_sentence": 1, "id": number} for number in range(5)
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
    """A photo of noise with hand 2 in its left half, object 1 in the right one, and a depth map with holes."""
    random = np.random.default_rng(5)
    ids = np.zeros((108, 192), np.uint8)
    ids[20:90, 10:80], ids[30:70, 100:170] = 2, 1
    depth = random.integers(300, 60000, (108, 192)).astype(np.uint16)
    depth[:12] = 0
    depth[random.random(depth.shape) < 0.2] = 0
    photo = random.integers(0, 255, (108, 192, 3), dtype=np.uint8)
    for folder, pixels, ending in (
        ("RGB", photo, "jpg"),
        ("depth", depth, "png"),
        ("mask", ids, "png"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / f"{stem}.{ending}")
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
    answers = [f"Answer {number}." for number in range(4)]
    masks = [[2, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0]]
    write_image(
        tmp_path, [annotation(answer=a, masks_idx=m) for a, m in zip(answers, masks, strict=True)]
    )
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
    both = annotation(tokens=["the right hand", "the active pliers", "", ""], masks_idx=[2, 1, 0])
    write_image(tmp_path, [both])
    (turn,) = open_set(tmp_path, answer_format="phrases")[0, 0].turns
    assert turn.answer == "the right hand and the active pliers"
    (turn,) = open_set(tmp_path)[0, 0].turns
    assert turn.answer == both["answer"]


def test_label(scenes: Path) -> None:
    dataset = open_set(scenes)
    assert dataset.label(STEM, "the right hand") == "right_hand"
    assert dataset.label(STEM, "Left hand") == "left_hand"
    assert dataset.label(STEM, "the active trash can interacting with right hand") == "trash_can"
    assert dataset.label(STEM, "the object of the left hand") == "pliers"  # C11
    assert dataset.label("photo", "the object") == "other"


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
            "The mask of the right hand is <MSK_0>, and the mask of the active laptop interacting with right hand is "
            "<MSK_1>.",
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
        ("<MSK_0>", {0: ""}),
        (prompts.NO_TARGET_ANSWER, {}),
        ("", {}),
    ],
)
def test_phrases_of_an_answer(answer: str, phrases: dict[int, str]) -> None:
    assert prompts.phrases_of(answer) == phrases


# Draws


def test_wordings_are_drawn_anew_every_epoch(scenes: Path) -> None:
    """The released code draws a query once, when it loads; here every (seed, epoch, stem) has its own draw."""

    def drawn(epoch: int, index: int = 0, seed: int = 0) -> list[tuple]:
        return [
            (turn.annotation, turn.query_id)
            for turn in open_set(scenes, seed=seed)[epoch, index].turns
        ]

    dataset = open_set(scenes)
    epochs = [
        [(turn.annotation, turn.query_id) for turn in dataset[epoch, 0].turns] for epoch in range(5)
    ]
    assert epochs == [drawn(epoch) for epoch in range(5)]
    assert len({str(epoch) for epoch in epochs}) == 5
    assert drawn(0, seed=1) != drawn(0)


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
    seen = {
        (turn.annotation, turn.query_id) for epoch in range(400) for turn in dataset[epoch, 0].turns
    }
    assert seen == {(n, q["id"]) for n, a in enumerate(dataset.annotations[0]) for q in a.questions}


def test_evaluation_asks_about_every_annotation(scenes: Path) -> None:
    dataset = open_set(scenes, "test")
    once, twice = dataset.evaluation_sample(0), dataset.evaluation_sample(0, 2)
    assert [turn.annotation for turn in once.turns] == list(range(len(dataset.annotations[0])))
    assert [turn for turn in twice.turns][::2] == once.turns
    assert len({turn.query_id for turn in twice.turns}) == 2 * len(once.turns)
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
    assert (
        bright == (sample.target_ids == 2)
    ).mean() > 0.99  # the photo shows the hand where the ids say so


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
    """The released code trains on invalid pixels; here they change nothing, and an image of them alone is fine."""
    write_image(tmp_path, [annotation()])
    Image.fromarray(np.zeros((108, 192), np.uint16)).save(tmp_path / "depth" / f"{STEM}.png")
    sample = open_set(tmp_path)[0, 0]
    assert (sample.depth == 0).all()

    def total(predicted: Tensor, depth: Tensor) -> Tensor:
        return depth_total(SimpleNamespace(depth=predicted), SimpleNamespace(depth=depth))

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
    """Paths of the images that were decoded, as they are."""
    paths: list[Path] = []
    read_image = transforms.read_image

    def recording(path: Path, *arguments: object, **options: object) -> Image.Image:
        paths.append(path)
        return read_image(path, *arguments, **options)

    monkeypatch.setattr(transforms, "read_image", recording)
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
    assert [path.name for path in reader.cache_dir.iterdir()] == [
        f"{STEM}.safetensors"
    ]  # no parts are left behind


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
    damaged = [
        b"",
        b"PK\x03\x04",
        b"no archive",
        *(content[: int(n)] for n in random.integers(len(content), size=20)),
    ]
    for position in random.integers(len(content), size=200):
        damaged.append(
            content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :]
        )
    for number, wrong in enumerate(damaged):
        entry.write_bytes(wrong)
        assert same(reader.read(STEM, ()), good), number


def test_sizes_and_roots_do_not_share_entries(reader: PixelReader, tmp_path: Path) -> None:
    reader.read(STEM, ())
    smaller = PixelReader(reader.root, 56, tmp_path / "cache").read(STEM, ())
    assert smaller.image.shape == (56, 56, 3)
    shutil.copytree(reader.root / "RGB", tmp_path / "b" / "RGB")
    other = PixelReader(tmp_path / "b", SIZE, tmp_path / "cache")
    assert other.cache_dir != reader.cache_dir


def _fill(reader: PixelReader, ids: tuple[int, ...]) -> Pixels:
    for _ in range(20):
        pixels = reader.read(STEM, ids)
        entry = reader.cache_dir / f"{STEM}.safetensors"
        entry.unlink(missing_ok=True)
    return pixels


def test_processes_may_fill_one_cache_together(reader: PixelReader) -> None:
    with get_context("fork").Pool(2) as pool:
        one, other = pool.starmap(_fill, [(reader, (1, 2))] * 2, chunksize=1)
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
    assert batch.queries.image_index.tolist() == [
        i for i, sample in enumerate(samples) for _ in sample.turns
    ]
    assert batch.slot_ids.tolist() == [[*turn.slot_ids, 0, 0][:2] for turn in turns]
    assert batch.images.shape == (3, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    np.testing.assert_array_equal(batch.images[1].permute(1, 2, 0), samples[1].image)
    np.testing.assert_array_equal(batch.depth[2], samples[2].depth)
    np.testing.assert_array_equal(batch.target_ids[0], samples[0].target_ids)


def test_labels_are_on_responses_and_eos_alone(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    text, targets = batch.text, iter(batch.text.labels.tolist())
    flat_ids, flat_segment = text.input_ids.flatten(), text.segment_ids.flatten()
    responses = []
    for sample in batch.samples:
        responses += [(True, sample.analysis), *((False, turn.answer) for turn in sample.turns)]
    labels = []
    for is_analysis, response in responses:
        ids = [*tokenizer.encode(response), tokenizer.eos_id]
        assert [next(targets) for _ in ids] == ids
        labels += [is_analysis] * len(ids)
    assert next(targets, None) is None
    assert text.is_analysis.tolist() == labels
    assert torch.equal(
        flat_ids[text.label_positions + 1], text.labels
    )  # a label is the next token of the same branch
    assert torch.equal(flat_segment[text.label_positions + 1], flat_segment[text.label_positions])
    assert torch.equal(flat_segment[text.label_positions] == ANALYSIS, text.is_analysis)


def test_branches_start_where_the_prefix_ends(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    text = batch.text
    prefix = [tokenizer.bos_id, *tokenizer.encode(prompts.PREFIX)]
    for row in range(len(batch.samples)):
        assert text.input_ids[row, : text.image_start].tolist() == prefix
        assert text.position_ids[row, : text.prefix_length].tolist() == list(
            range(text.prefix_length)
        )
        for branch in range(ANALYSIS, int(text.segment_ids[row].max()) + 1):
            positions = text.position_ids[row, text.segment_ids[row] == branch]
            assert positions.tolist() == list(
                range(text.prefix_length, text.prefix_length + len(positions))
            )


def test_prompts_end_the_sequences_without_responses(make_parts: MakeParts) -> None:
    model, tokenizer, batch = make_parts()
    bare = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    assert len(bare.text.labels) == len(bare.text.label_positions) == 0
    assert torch.equal(bare.text.branch_length, batch.text.branch_length)
    queries = [turn.query for sample in batch.samples for turn in sample.turns]
    for query, branch in zip(queries, bare.text.query_branches.tolist(), strict=True):
        start, length = int(bare.text.branch_start[branch]), int(bare.text.branch_length[branch])
        prompt = bare.text.input_ids[
            bare.text.branch_image_index[branch], start : start + length
        ].tolist()
        assert prompt == tokenizer.encode(prompts.query_prompt(query))


def test_object_phrases_in_a_batch(make_parts: MakeParts) -> None:
    _, tokenizer, batch = make_parts()
    for row, sample in enumerate(batch.samples):
        ids = [mask_id for mask_id in batch.object_ids[row].tolist() if mask_id]
        words = [[word for word in row if word >= 0] for row in batch.object_words[row].tolist()]
        expected = {
            mask_id: tokenizer.encode(phrase) for mask_id, phrase in sample.object_phrases.items()
        }
        assert dict(zip(ids, words, strict=False)) == expected


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
        assert len(sample.turns) == sum(len(a.questions) for a in dataset.annotations[index])
        assert (sample.depth == 0).all()
        assert set(sample.object_phrases) == {1, 2} <= set(np.unique(sample.target_ids).tolist())
        assert sample.original_size == Image.open(root / "RGB" / f"{stem}.jpg").size[::-1]
        for turn in sample.turns:
            used = [slot for slot, mask_id in enumerate(turn.slot_ids) if mask_id]
            assert sorted(prompts.phrases_of(turn.answer)) == used
    hand, both, none = read_annotations(
        root / "dataset_split" / "test" / f"{dataset.stems[0]}.json"
    )
    assert (hand.slots, both.slots, none.slots) == ({0: 2}, {0: 2, 1: 1}, {})
    assert "<MSK_0>" in hand.answer and none.answer == prompts.NO_TARGET_ANSWER
    assert dataset.label(dataset.stems[0], both.phrase(1)) == "trash_can"
