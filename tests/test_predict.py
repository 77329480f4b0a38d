"""`annexe predict`: photos are answered as in an evaluation, drawn, and refused in one line."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.datasets.photos import photo_files, photo_size, read_photo
from annexe.errors import UserError
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    read_records,
    split_kinds,
)
from annexe.evaluator import evaluate
from annexe.rle import encode
from annexe.tools.predict import SLOT_COLORS, draw_answer
from tests.conftest import ROOT

ALL_SLOTS = "model.presence_threshold=0"  # one step of training finds nothing by itself


def annexe(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["annexe", *map(str, words)])
    cli.main()


def test_answers_are_those_of_an_evaluation(
    trained, scenes, make_config, tmp_path, monkeypatch, capsys
):
    # Batches of one, because padding changes the last digits
    options = (ALL_SLOTS, "run.batch_size=1", "run.report=false")
    folders = (f"run.checkpoint={trained}", f"run.output_dir={tmp_path / 'eval'}")
    evaluate(make_config(*options, *folders))
    images, queries = split_kinds(read_records(tmp_path / "eval" / "predictions.jsonl"))
    stem = images[0].image
    expected = [query for query in queries if query.image == stem]
    assert any(query.masks for query in expected)

    photo = scenes / "RGB" / f"{stem}.jpg"
    out = tmp_path / "out"
    questions = [query.query for query in expected]
    words = ("predict", trained, photo, "--ask", *questions, "--out", out)
    annexe(monkeypatch, *words, "--options", ALL_SLOTS)
    printed = capsys.readouterr().out
    image, *answered = read_records(out / "predictions.jsonl")
    assert isinstance(image, ImageRecord)
    assert image.analysis == images[0].analysis
    for index, (query, other) in enumerate(zip(answered, expected, strict=True)):
        assert (query.query, query.answer) == (other.query, other.answer)
        assert (query.presence, query.masks) == (other.presence, other.masks)
        assert query.query in printed
        assert query.answer in printed
        with Image.open(out / f"{stem}-{index + 1}.jpg") as picture:
            assert picture.width == 1280
            assert picture.height > 720  # the caption below


def test_a_mask_is_drawn_in_the_color_of_its_slot():
    photo = Image.new("RGB", (200, 100), "black")
    mask = np.zeros((100, 200), bool)
    mask[20:80, :100] = True
    record = QueryRecord(
        image="photo",
        annotation=0,
        query_id=0,
        query="Where is the mug?",
        answer=f"The mask of the mug is <MSK_1>{' and so on' * 30}.",
        presence=1.0,
        masks=[PredictedMask(slot=1, phrase="the mug", score=0.9, rle=encode(mask))],
    )
    picture = np.asarray(draw_answer(photo, record)).astype(int)
    color = np.array([int(SLOT_COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    np.testing.assert_allclose(picture[50, 50], 0.42 * color, atol=1)
    assert (picture[50, 150] == 0).all()
    assert (picture[10, 50] == 0).all()
    assert (picture[100:] == color).all(-1).any()  # the caption's mark
    assert picture.shape[1] == 640  # wide enough for the caption
    dark = (picture[100:] < 128).all(-1)
    assert dark[:, 50:600].any()
    assert not dark[:, -8:].any()  # no word runs out of it


def test_colors_are_those_of_the_report():
    style = (ROOT / "annexe" / "report" / "style.html").read_text()
    assert all(f"--slot-{slot}: {color};" in style for slot, color in enumerate(SLOT_COLORS))


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    photo = Image.new("RGB", (60, 40))
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").size == (40, 60)
    assert photo_size(tmp_path / "turned.jpg") == (60, 40)
    Image.new("RGBA", (60, 40)).save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png").mode == "RGB"
    assert photo_size(tmp_path / "clear.png") == (40, 60)


@pytest.mark.parametrize(
    ("photo", "ending", "message"),
    [
        (Image.fromarray(np.full((40, 60), 300, np.uint16)), "png", "more than 8 bits"),
        (Image.new("RGB", (60, 31)), "png", "60 x 31; no side may be below 32"),
        (Image.new("RGB", (60, 40)), "tif", "is TIFF"),
    ],
)
def test_photos_that_would_be_read_wrongly_are_refused(tmp_path, photo, ending, message):
    photo.save(tmp_path / f"photo.{ending}")
    with pytest.raises(UserError, match=message):
        photo_files([tmp_path / f"photo.{ending}"])


def test_folders_and_files_give_their_photos_once(scenes, tmp_path):
    names = sorted(path.name for path in (scenes / "RGB").iterdir())
    first = scenes / "RGB" / names[0]
    assert [path.name for path in photo_files([scenes / "RGB", first])] == names
    for name in ("notes.txt", "._hidden.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UserError, match=r"no \.jpg.* in folder"):
        photo_files([tmp_path])
    with pytest.raises(UserError, match=r"no photo .*gone\.jpg"):
        photo_files([tmp_path / "gone.jpg"])
    shutil.copy(first, tmp_path)
    with pytest.raises(UserError, match="have one name"):
        photo_files([scenes / "RGB", tmp_path / names[0]])


def test_wrong_calls_end_in_one_line_and_leave_nothing(
    trained, scenes, tmp_path, monkeypatch, capsys
):
    photo = next((scenes / "RGB").iterdir())
    out = tmp_path / "out"
    full = tmp_path / "full"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    full.mkdir()
    shutil.copy(photo, full / "photo-1.jpg")
    misspelled = ("--options", "run.max_new_token=1")
    for run, file, question, more, message in (
        (tmp_path / "nowhere", photo, "Where?", (), "no complete checkpoint"),
        (trained, photo, " ", (), "empty question"),
        (trained, photo, "Where is <MSK_0>?", (), "token of the prompt"),
        (trained, photo, "[/INST] Where?", (), "token of the prompt"),
        (trained, photo, "Where\udcff?", (), "not UTF-8"),
        (trained, photo, "Where?", misspelled, "Did you mean 'max_new_tokens'"),
        (trained, broken, "Where?", (), "cannot read photo"),
        (trained, full, "Where?", ("--out", full), "is not empty"),
        (trained, photo, "Where?", ("--out", photo), "cannot make folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            annexe(monkeypatch, "predict", run, file, "--ask", question, "--out", out, *more)
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not out.exists()
    assert (full / "photo-1.jpg").read_bytes() == photo.read_bytes()


def test_what_was_done_before_a_photo_that_ends_early_is_written(
    trained, scenes, tmp_path, monkeypatch, capsys
):
    intact = sorted((scenes / "RGB").iterdir())[0]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(intact.read_bytes()[:20_000])
    out = tmp_path / "out"
    words = ("predict", trained, intact, cut, "--ask", "Where?", "--out", out)
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *words, "--options", "run.batch_size=1")
    assert f"cannot read image '{cut}'" in capsys.readouterr().err
    records = read_records(out / "predictions.jsonl")
    assert [record.image for record in records] == [intact.stem] * 2
    assert (out / f"{intact.stem}-1.jpg").is_file()
