"""The predictor: any kind of image, any number of questions, alone or in batches, as records."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from annexe import Predictor
from annexe.errors import UserError
from annexe.evaluation.records import line_of
from annexe.inference.predictor import NewWords, check_question
from annexe.inference.results import Answer, GroundedTarget, Photo, PhotoResult
from annexe.prompts import split_answer
from annexe.rle import encode

ALL_SLOTS = "model.presence_threshold=0"  # one step of training finds nothing by itself
QUESTIONS = ["Where is the left hand?", "What does the right hand hold?", "Show the cup."]


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return Predictor.from_run(trained, device="cpu", options=[ALL_SLOTS])


@pytest.fixture(scope="module")
def photos(scenes):
    return sorted((scenes / "RGB").glob("*.jpg"))[:5]


def lines(result: PhotoResult) -> list[str]:
    """The lines of predictions.jsonl, as text."""
    return [line_of(record) for record in result.to_records()]


def said(result: PhotoResult) -> list:
    """Texts and masks, without the digits of presence."""
    answers = [(answer.text, [t.rle for t in answer.targets]) for answer in result.answers]
    return [result.analysis, *answers]


def pairs(answer: Answer, other: Answer) -> list[tuple[GroundedTarget, GroundedTarget]]:
    """The targets of two answers, which have the same slots."""
    return list(zip(answer.targets, other.targets, strict=True))


def test_importing_annexe_takes_no_torch():
    code = "import sys, annexe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_its_bytes_and_its_pixels_give_the_same(predictor, photos, tmp_path):
    # A JPEG may be decoded at a part of its size, which its pixels cannot be
    (from_file,) = predictor.predict(photos[0], QUESTIONS)
    (from_bytes,) = predictor.predict(photos[0].read_bytes(), QUESTIONS)
    assert said(from_file) == said(from_bytes)
    assert from_file.name == photos[0].stem
    assert from_bytes.name == "photo"

    # Of a PNG all pixels count
    pixels = from_file.photo()
    pixels.save(tmp_path / "still.png")
    from_png, *others = predictor.predict([tmp_path / "still.png", pixels, np.asarray(pixels)])
    assert [said(other) for other in others] == [said(from_png)] * 2
    assert [other.name for other in others] == ["photo-2", "photo-3"]


def test_results_are_typed_and_are_the_lines_of_predictions(predictor, photos):
    (result,) = predictor.predict([photos[0]], QUESTIONS)
    height, width = result.size
    assert result.depth.shape == (predictor.image_size, predictor.image_size)
    assert [answer.question for answer in result.answers] == QUESTIONS
    assert result.to_record()["analysis"] == result.analysis
    assert any(answer.targets for answer in result.answers)
    for index, answer in enumerate(result.answers):
        assert answer.to_record()["annotation"] == index
        assert answer.is_refused == (not answer.targets)
        assert 0 <= answer.presence <= 1
        assert len(answer.slot_scores) == predictor.model.pixel_decoder.num_slots
        for target in answer.targets:
            assert target.mask.shape == (height, width)
            assert encode(target.mask) == target.rle
            left, top, right, bottom = target.box
            rows, columns = np.nonzero(target.mask)
            assert (left, top) == (columns.min(), rows.min())
            assert (right, bottom) == (columns.max() + 1, rows.max() + 1)
    assert result.draw(0).width == max(640, min(width, 1280))


def test_a_photo_alone_is_analyzed(predictor, photos):
    alone = predictor.predict(photos[0])
    mixed = predictor.predict(photos[:3], [[], QUESTIONS[:1], []])
    assert [len(result.answers) for result in mixed] == [0, 1, 0]
    assert alone[0].analysis == mixed[0].analysis
    assert alone[0].answers == []
    assert alone[0].draw().height > alone[0].size[0] / max(1, alone[0].size[1] / 1280)
    assert len(lines(alone[0])) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_photos_say_the_same_alone_and_in_batches(trained, predictor, photos, batch_size):
    """But for rounding, by which a pixel on the border of a mask may fall on its other side."""
    other = Predictor.from_run(trained, device="cpu", batch_size=batch_size, options=[ALL_SLOTS])
    together = other.predict(photos, QUESTIONS)
    apart = [predictor.predict(photo, QUESTIONS)[0] for photo in photos]
    for result, expected in zip(together, apart, strict=True):
        assert result.analysis == expected.analysis
        for answer, alone in zip(result.answers, expected.answers, strict=True):
            assert answer.text == alone.text
            assert answer.presence == pytest.approx(alone.presence, abs=2e-6)
            masks = [(target.mask, other.mask) for target, other in pairs(answer, alone)]
            assert all((mask != other).mean() < 1e-4 for mask, other in masks)
    if batch_size == 1:
        assert list(map(lines, together)) == list(map(lines, apart))


def test_a_bad_photo_or_question_costs_itself_alone(predictor, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:2000])
    batch = [
        Photo.of(photos[0], QUESTIONS),
        Photo.of(broken, QUESTIONS),
        Photo.of(photos[1], ["  "]),
        Photo.of(photos[1], ["what " * 5000]),
        Photo.of(Image.new("RGB", (20, 20)), QUESTIONS),
        Photo.of(photos[1], QUESTIONS),
    ]
    results = predictor.answer_batch(batch)
    errors = [str(result) for result in results if isinstance(result, UserError)]
    assert len(errors) == 4
    for error, part in zip(errors, ["broken.jpg", "empty", "tokens", "20 x 20"], strict=True):
        assert part in error
        assert "\n" not in error
    good = [results[0], results[5]]
    expected = predictor.predict([photos[0], photos[1]], QUESTIONS)
    assert [said(result) for result in good] == [said(result) for result in expected]
    assert list(map(type, predictor.iterate(batch))) == list(map(type, results))
    assert all(isinstance(result, UserError) for result in predictor.answer_batch(batch[1:3]))


@pytest.mark.parametrize(
    ("images", "questions", "message"),
    [
        (np.zeros((40, 40), np.uint8), None, "uint8[height, width, 3]"),
        (np.zeros((40, 40, 3), np.float32), None, "float32[40, 40, 3]"),
        (
            Image.fromarray(np.zeros((40, 40), np.uint16)),
            None,
            "more than 8 bits a channel (mode I",
        ),
        (3, None, "type int"),
        ("missing.jpg", None, "no photo 'missing.jpg'"),
        (b"no image", None, "cannot read photo 'photo'"),
        (b"", None, "the file is empty"),
        ([Image.new("RGB", (64, 64))] * 2, [["one"]], "1 lists of questions for 2 photos"),
        (Image.new("RGB", (64, 64)), ["<MSK_0>"], "a token of the prompt"),
        (Image.new("RGB", (64, 64)), ["the </s> mug"], "holds '</s>', a token of the prompt"),
        (Image.new("RGB", (64, 64)), ["\ud800"], "not UTF-8"),
        (Image.new("RGB", (64, 64)), 5, "questions are of type int; give a text, or a list"),
        (Image.new("RGB", (64, 64)), b"Where?", "questions are of type bytes"),
    ],
)
def test_what_cannot_be_asked_is_named(predictor, images, questions, message):
    with pytest.raises(UserError) as error:
        predictor.predict(images, questions)
    assert message in str(error.value)


def test_a_question_is_text():
    with pytest.raises(UserError, match="type int"):
        check_question(3)


def test_words_are_streamed_as_they_are_generated(predictor, photos):
    (expected,) = predictor.predict(photos[0], QUESTIONS[0])
    threads = torch.get_num_threads()
    *pieces, result = predictor.stream(photos[0], QUESTIONS[0])
    assert "".join(pieces) == expected.answers[0].text
    assert len(pieces) > 1
    assert lines(result) == lines(expected)
    assert torch.get_num_threads() == threads
    with pytest.raises(UserError, match="cannot read"):
        list(predictor.stream(b"nothing", QUESTIONS[0]))
    with pytest.raises(UserError, match="a question is of type list; give text"):
        list(predictor.stream(photos[0], []))


def test_the_last_word_is_held_back_until_it_is_complete():
    words = NewWords()
    grown = [list(words.grow(text)) for text in ("The", "The ri", "The right", "The right ha")]
    assert grown == [[], ["The "], [], ["right "]]
    assert list(words.finish("The right hand.")) == ["hand."]
    assert list(words.finish("The right hand.")) == []


def test_memory_does_not_grow_with_the_number_of_photos(predictor, photos):
    """A photo is read when its batch is due, not before."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield Photo.of(photos[0])

    results = predictor.iterate(endless())
    for _ in range(3 * predictor.batch_size):
        assert isinstance(next(results), PhotoResult)
    assert len(read) <= 5 * predictor.batch_size


@pytest.mark.parametrize(
    ("answer", "slots", "pieces"),
    [
        (
            "The mask of the right hand is <MSK_0>, and the mask of the mug is <MSK_2>.",
            [0, 2],
            [
                ("The mask of ", None),
                ("the right hand", 0),
                (" is", None),
                (", and the mask of ", None),
                ("the mug", 2),
                (" is", None),
                (".", None),
            ],
        ),
        ("The mug <MSK>.", [1], [("The mug", 1), (".", None)]),
        ("the mug and the lid", [0], [("the mug", 0), (" and ", None), ("the lid", None)]),
        (
            "There is no suitable referring result.",
            [],
            [("There is no suitable referring result.", None)],
        ),
        ("", [], []),
    ],
)
def test_phrases_of_an_answer_are_told_with_their_slots(answer, slots, pieces):
    assert split_answer(answer, slots) == pieces


def test_the_parts_of_an_answer_have_the_slots_of_its_targets(predictor, photos):
    for result in predictor.predict(photos, QUESTIONS):
        for answer in result.answers:
            named = {slot for _, slot in answer.parts() if slot is not None}
            if answer.text.count("<MSK_") == len(answer.targets):
                assert named == {target.slot for target in answer.targets}
            assert "<MSK" not in "".join(text for text, _ in answer.parts())


def test_a_run_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path, "~"):
        with pytest.raises(UserError, match=f"no complete checkpoint.*{tmp_path}"):
            Predictor.from_run(folder)


def test_about_names_what_the_model_was_trained_on(predictor, trained, scenes):
    about = predictor.about
    assert about["run"] == str(trained)
    assert about["data_root"] == str(scenes)
    assert about["step"] == 1


def test_a_damaged_upload_is_no_traceback(predictor, photos):
    buffer = io.BytesIO()
    Image.open(photos[0]).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 255
    (result,) = predictor.answer_batch([Photo.of(bytes(data))])
    assert isinstance(result, UserError)
    assert "cannot read photo 'photo'" in str(result)
