"""`annexe predict`: photos are answered as in an evaluation, drawn, and refused in one line."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from rich.control import strip_control_codes

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
from annexe.files import append_text
from annexe.rle import encode
from annexe.tools.predict import SLOT_COLORS, FinishedBatches, draw_answer
from tests.conftest import ROOT
from tests.test_ends_well import full_disk

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
        assert strip_control_codes(query.answer) in printed
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
        photo_size(tmp_path / f"photo.{ending}")


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


def cut_short(intact: Path, path: Path) -> Path:
    path.write_bytes(intact.read_bytes()[:20_000])
    return path


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    """A folder with six photos and seven files that cannot be answered."""
    folder = tmp_path / "photos"
    folder.mkdir()
    intact = sorted((scenes / "RGB").iterdir())
    for index, path in enumerate(intact[:6]):
        Image.open(path).resize((320, 180)).save(folder / f"good-{index}.jpg")
    cut_short(intact[0], folder / "good-1-cut.jpg")
    cut_short(intact[1], folder / "good-3-cut.jpg")
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(folder / "deep.png")
    rgb = np.full((40, 60, 3), 300, np.uint16)
    cv2.imwrite(str(folder / "deep-rgb.png"), rgb)
    header = Image.new("1", (20_000, 20_000))
    header.save(folder / "huge.png")
    return folder


REASONS = {
    "deep.png": "more than 8 bits a channel (mode I;16",
    "deep-rgb.png": "more than 8 bits a channel (mode RGB;16B)",
    "empty.jpg": "the file is empty",
    "good-1-cut.jpg": "truncated",
    "good-3-cut.jpg": "truncated",
    "huge.png": "has more than 179 million pixels; scale it down",
    "text.png": "not an image",
}


def ask_photos(run: Path, photos: Path, out: Path, *options: str) -> list[object]:
    words = ["predict", run, photos, "--ask", "Where is the mug?", "What is held?", "--out", out]
    return [*words, "--options", ALL_SLOTS, "run.batch_size=2", *options]


def test_a_photo_that_cannot_be_read_costs_its_own_answers_alone(
    trained, photos, tmp_path, monkeypatch, capsys
):
    # The second call finds all done; the third reads photos in a process of its own
    for folder, num_workers in (("one", 0), ("one", 0), ("two", 1)):
        out = tmp_path / folder
        with pytest.raises(SystemExit, match="2"):
            annexe(monkeypatch, *ask_photos(trained, photos, out, f"run.num_workers={num_workers}"))
        printed = capsys.readouterr()
        assert "6 of 13 photos were answered, not these 7" in printed.err
        reasons = printed.err.splitlines()[-7:]
        for (name, reason), line in zip(sorted(REASONS.items()), reasons, strict=True):
            assert f"'{photos / name}'" in line
            assert reason in line
            assert "doctor" not in line
        images, queries = split_kinds(read_records(out / "predictions.jsonl"))
        assert [image.image for image in images] == [f"good-{index}" for index in range(6)]
        assert len(queries) == 12
        assert (out / "good-5-2.jpg").is_file()


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


def test_after_two_kills_the_file_is_that_of_an_undisturbed_run(
    trained, photos, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *ask_photos(trained, photos, tmp_path / "whole"))
    expected = capsys.readouterr().err
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()

    # Killed in the middle of a line, first of the answers, then of the list of what is done
    out = tmp_path / "out"
    for name, call in (("predictions.jsonl", 2), ("progress.jsonl", 2)):
        calls: list[str] = []

        def half(path: Path, text: str, name: str = name, call: int = call, calls=calls) -> None:
            calls.append(path.name)
            if calls.count(name) < call or path.name != name:
                append_text(path, text)
                return
            append_text(path, text[: len(text) // 2])
            raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("annexe.tools.predict.append_text", half)
            with pytest.raises(Killed):
                annexe(patched, *ask_photos(trained, photos, out))
        assert not (out / name).read_bytes().endswith(b"\n")
        assert (out / "predictions.jsonl").stat().st_size < len(whole)

    # The same command goes on, and says again what cannot be read
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *ask_photos(trained, photos, out))
    printed = capsys.readouterr()
    assert "going on after 2 of 4 batches" in printed.out
    assert printed.err == expected
    for name in ("predictions.jsonl", "progress.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_the_same_command_goes_on(trained, scenes, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    names = sorted(path.name for path in (scenes / "RGB").iterdir())[:2]
    for name in names:
        Image.open(scenes / "RGB" / name).resize((320, 180)).save(photos / name)
    out = tmp_path / "out"
    words = ("predict", trained, photos, "--out", out, "--ask", "Where?", "--options")
    annexe(monkeypatch, *words, ALL_SLOTS)
    before = (out / "predictions.jsonl").read_bytes()
    capsys.readouterr()
    annexe(monkeypatch, *words, ALL_SLOTS)
    assert "going on after 1 of 1 batches" in capsys.readouterr().out

    def refused(message: str, *changed: object) -> None:
        with pytest.raises(SystemExit, match="2"):
            annexe(monkeypatch, *changed)
        error = capsys.readouterr().err
        assert message in error
        assert "repeat the command as it was, choose another --out" in error
        assert len(error.splitlines()) == 1
        assert (out / "predictions.jsonl").read_bytes() == before

    other = ("predict", trained, photos, "--out", out, "--ask", "Where is it?", "--options")
    refused("--ask ['Where?'], which is now ['Where is it?']", *other, ALL_SLOTS)
    refused("run.batch_size 4, which is now 1", *words, ALL_SLOTS, "run.batch_size=1")
    refused("model.presence_threshold 0", *words, "model.presence_threshold=0.5")
    with monkeypatch.context() as patched:
        patched.setattr("annexe.tools.predict.locked", lambda *_, **__: nullcontext())
        one = ("predict", trained, photos / names[0], "--out", out, "--ask", "Where?", "--options")
        refused("other photos", *one, ALL_SLOTS)
    os.utime(photos / names[0], (0, 0))
    refused("one of them has changed", *words, ALL_SLOTS)


def test_a_damaged_list_of_what_is_done_is_refused(tmp_path):
    for line in (b"{}\n", b"no JSON\n", b"3\n"):
        folder = tmp_path / line.hex()
        folder.mkdir()
        finished = FinishedBatches(folder, {"--ask": ["Where?"]})
        assert finished.open() == 0
        finished.add([], {"cut.jpg": "cut"})
        assert FinishedBatches(folder, {"--ask": ["Where?"]}).open() == 1
        with (folder / "progress.jsonl").open("ab") as file:
            file.write(line)
        with pytest.raises(UserError, match=r"progress.jsonl' is damaged; choose another --out"):
            finished.open()


def test_a_full_disk_keeps_what_is_whole(trained, photos, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *ask_photos(trained, photos, tmp_path / "whole"))
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    out = tmp_path / "out"
    pictures = [path.stat().st_size for path in (tmp_path / "whole").glob("*.jpg")]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"), full_disk(max(max(pictures), len(whole) - 10)):
        annexe(monkeypatch, *ask_photos(trained, photos, out))
    error = capsys.readouterr().err
    assert f"cannot use '{out}" in error
    assert "too large" in error
    assert whole.startswith((out / "predictions.jsonl").read_bytes())
    assert not list(out.glob("*.part"))
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *ask_photos(trained, photos, out))
    assert (out / "predictions.jsonl").read_bytes() == whole
