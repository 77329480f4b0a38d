"""`annexe predict`: photos are answered as in an evaluation, drawn, and refused in one line."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from rich.control import strip_control_codes

from annexe import Predictor, cli
from annexe.datasets.photos import photo_size, read_photo, refused_photos
from annexe.errors import UserError
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    Record,
    line_of,
    read_records,
    split_kinds,
)
from annexe.evaluator import evaluate
from annexe.files import append_text
from annexe.inference.drawing import SLOT_COLORS, draw_answer
from annexe.inference.inputs import find_inputs
from annexe.inference.journal import FinishedBatches
from annexe.inference.outputs import id_map
from annexe.inference.questions import questions_of
from annexe.inference.results import Answer, Photo
from annexe.rle import decode, encode
from annexe.terminal import with_time_left
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
    with Image.open(tmp_path / "turned.jpg") as opened:
        of_pillow = Photo.of(opened)
        assert (of_pillow.size, of_pillow.read().size) == ((60, 40), (40, 60))
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


def names_of(*paths: Path, leave_out: Path | None = None) -> list[str]:
    """The photos and then the videos that paths mean, by name."""
    inputs = find_inputs(paths, leave_out)
    return [file.name for file in [*inputs.photos, *inputs.videos]]


def test_folders_and_files_give_their_photos_once(scenes, tmp_path, caplog):
    names = sorted(path.name for path in (scenes / "RGB").iterdir())
    first = scenes / "RGB" / names[0]
    assert names_of(scenes / "RGB", first) == names
    for name in ("notes.txt", "._hidden.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UserError, match=r"no \.jpg.* in folder"):
        names_of(tmp_path)
    with pytest.raises(UserError, match=r"no photo .*gone\.jpg"):
        names_of(tmp_path / "gone.jpg")
    shutil.copy(first, tmp_path)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "z.jpg").symlink_to("gone.jpg")
    assert names_of(tmp_path) == names_of(tmp_path / "*.jpg") == [names[0], "loop.jpg", "z.jpg"]
    assert "by their ending are left out: 1, such as 'notes.txt'" in caplog.text
    assert len(refused_photos([tmp_path / "loop.jpg", tmp_path / "z.jpg"])) == 2
    with pytest.raises(UserError, match="have one name"):
        names_of(scenes / "RGB", tmp_path / names[0])


def test_patterns_are_read_as_a_shell_reads_them(tmp_path):
    for name in ("b.jpg", "a.PNG", "one/c.jpg", "one/two/d.webp", "one/e.mp4", "out/a-1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", ".hidden.jpg", "[1].jpg"):
        (tmp_path / name).touch()
    out = tmp_path / "out"
    everything = ["[1].jpg", "a.PNG", "b.jpg", "c.jpg", "d.webp", "e.mp4"]
    assert names_of(tmp_path / "**", leave_out=out) == everything
    assert names_of(tmp_path / "**" / "*.*", leave_out=out) == everything
    assert names_of(tmp_path / "**" / "*.jpg", leave_out=out) == ["[1].jpg", "b.jpg", "c.jpg"]
    assert names_of(tmp_path / "*.jpg", tmp_path / "?.PNG") == ["[1].jpg", "b.jpg", "a.PNG"]
    assert names_of(tmp_path / "o*e") == ["c.jpg", "e.mp4"]  # a folder
    assert names_of(tmp_path / "[1].jpg") == ["[1].jpg"]  # a file of that name
    with pytest.raises(UserError, match=r"no photo or video matches .*\*\.gif"):
        names_of(tmp_path / "*.gif")


# Questions

TWO = [Path("photos/a.jpg"), Path("photos/b.jpg")]


def asked(path: Path, content: str | bytes, *, files: list[Path] = TWO) -> list[list[str]]:
    """What a file of questions asks of each photo."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [list(questions) for questions in questions_of(files, (), path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_of_questions_are_read_whatever_wrote_them(tmp_path, encoding, end):
    lines = ["Where is the café's mug?", "", "  What is held, and by whom? ", ""]
    content = end.join(lines).encode(encoding)
    questions = ["Where is the café's mug?", "What is held, and by whom?"]
    assert asked(tmp_path / "ask.txt", content) == [questions, questions]

    # Tables: commas in quotes, or another delimiter
    for delimiter in (",", ";"):
        rows = [f"Photo{delimiter}question", f'a.jpg{delimiter}"Where, {delimiter} ""there""?"']
        content = end.join([*rows, f"b{delimiter}What?"]).encode(encoding)
        assert asked(tmp_path / "ask.csv", content) == [
            [f'Where, {delimiter} "there"?'],
            ["What?"],
        ]
    lines = [json.dumps({"photo": name, "question": f"Where is {name}?"}) for name in "ab"]
    content = end.join([*lines, ""]).encode(encoding)
    assert asked(tmp_path / "ask.jsonl", content) == [["Where is a?"], ["Where is b?"]]


def test_a_table_names_photos_with_or_without_folders(tmp_path):
    files = [Path("/data/one/a.jpg"), Path("/data/two/cafe\u0301.jpg"), Path("/data/two/a.mp4")]
    names = ["a.jpg", "one/a", "/data/one/a.jpg", "one\\a.jpg", "./one/a.jpg"]
    names += ["café", "a.mp4", "two/café.jpg"]
    lines = [f"{name},{index}" for index, name in enumerate(names)]
    content = "\n".join(["photo,question", *lines])
    expected = [["0", "1", "2", "3", "4"], ["5", "7"], ["6"]]
    assert asked(tmp_path / "ask.csv", content, files=files) == expected


def test_what_a_file_of_questions_does_not_ask_is_counted_and_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lines = ["photo,question,who", "a.jpg,Where?,me", "z.jpg,Where?,me", "x/a.jpg,What?,me"]
    assert asked(tmp_path / "ask.csv", "\n".join([*lines, "a.jpg,Where?,you"])) == [["Where?"], []]
    columns, strangers, without, repeated = [record.getMessage() for record in caplog.records]
    assert "1 columns ignored, such as 'who'" in columns
    assert "2 of 4 questions are about no photo that was given: 'z.jpg' (line 3)" in strangers
    assert "'x/a.jpg' (line 4)" in strangers
    assert "asks nothing of 1 of 2 photos: 'photos/b.jpg'" in without
    assert "1 questions stand twice" in repeated


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ask.txt", "", "has no question; write one a line"),
        ("ask.txt", "Where is the caf\xe9?".encode("latin-1"), "byte 16 is not UTF-8"),
        ("ask.txt", "Where?".encode("utf-16-le"), "it holds zero bytes"),
        ("ask.txt", "Where?\nWhere is <MSK_1>?\n", "line 2: question 'Where is <MSK_1>?' holds a"),
        ("ask.json", "[]", "neither text nor table"),
        ("ask.csv", "", "needs one column 'photo', its first line has ''"),
        ("ask.csv", "image,question\na.jpg,Where?", "needs one column 'photo'"),
        ("ask.csv", "photo,question,photo\n", "needs one column 'photo'"),
        ("ask.csv", "photo,question\na.jpg,Where, and why?", "line 2 has 3 fields and the header"),
        ("ask.csv", 'photo,question\na.jpg,"Where?', "line 2 is no CSV"),
        ("ask.csv", "photo,question\na.jpg,", "line 2: a question is empty"),
        ("ask.csv", "photo,question\nc.jpg,Where?", "none of the 2 photos, but 'c.jpg' (line 2)"),
        ("ask.csv", "photo,question\n", "has no line"),
        ("ask.jsonl", '{"photo": "a.jpg", "question": "Where?"}\n{', "line 2 is no JSON"),
        ("ask.jsonl", '{"photo": "a.jpg"}', "line 1 needs the texts 'photo' and 'question'"),
        ("ask.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("ask.jsonl", '{"photo": "a.jpg", "question": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_file_of_questions_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        asked(tmp_path / name, content)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_questions_that_is_not_there_is_one_line(tmp_path):
    for path in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(UserError, match="--ask-file: cannot read"):
            questions_of(TWO, (), path)


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
        (trained, photo, " ", (), "a question is empty"),
        (trained, photo, "Where is <MSK_0>?", (), "token of the prompt"),
        (trained, photo, "[/INST] Where?", (), "token of the prompt"),
        (trained, photo, "Where\udcff?", (), "not UTF-8"),
        (trained, photo, "Where?", misspelled, "Did you mean 'max_new_tokens'"),
        (trained, broken, "Where?", (), "cannot read photo"),
        (trained, full, "Where?", ("--out", full), "is not empty"),
        (trained, photo, "Where?", ("--out", photo), "cannot make folder"),
        (trained, photo, "Where?", ("--save", "jpg"), "'jpg' is none of jsonl, overlay"),
        (trained, photo, "Where?", ("--batch-size", "0"), "no whole number from 1 on"),
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


@pytest.fixture(scope="session")
def thirteen(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six photos and seven files that cannot be answered."""
    folder = tmp_path_factory.mktemp("thirteen")
    intact = sorted((scenes / "RGB").iterdir())
    for index, path in enumerate(intact[:6]):
        Image.open(path).resize((320, 180)).save(folder / f"good-{index}.jpg")
    cut_short(intact[0], folder / "good-1-cut.jpg")
    cut_short(intact[1], folder / "good-3-cut.jpg")
    (folder / "empty.jpg").touch()
    (folder / "lost.png").symlink_to("gone.png")
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(folder / "deep.png")
    rgb = np.full((40, 60, 3), 300, np.uint16)
    cv2.imwrite(str(folder / "deep-rgb.png"), rgb)
    header = Image.new("1", (20_000, 20_000))
    header.save(folder / "huge.png")
    return folder


@pytest.fixture
def photos(thirteen: Path, tmp_path: Path) -> Path:
    """A folder with six photos and seven files that cannot be answered, to be changed."""
    return shutil.copytree(thirteen, tmp_path / "photos", symlinks=True)


REASONS = {
    "deep.png": "more than 8 bits a channel (mode I;16",
    "deep-rgb.png": "more than 8 bits a channel (mode RGB;16B)",
    "empty.jpg": "the file is empty",
    "good-1-cut.jpg": "truncated",
    "good-3-cut.jpg": "truncated",
    "huge.png": "has more than 179 million pixels; scale it down",
    "lost.png": "no photo",
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
        assert "6 of 13 photos were answered, not these 7 (mend them, then name" in printed.err
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
            patched.setattr("annexe.inference.journal.append_text", half)
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
    refused("another --out and name there the new and mended photos alone", *words, ALL_SLOTS)


def test_a_folder_in_which_nothing_is_done_takes_other_questions(tmp_path):
    first = FinishedBatches(tmp_path, {"--ask": ["Where?"]})
    assert first.open() == 0
    other = FinishedBatches(tmp_path, {"--ask": ["What?"]})
    assert other.open() == 0
    other.add(0, "", {})
    with pytest.raises(UserError, match="holds answers with --ask"):
        first.open()


def test_a_damaged_list_of_what_is_done_is_refused(tmp_path):
    for line in (b"{}\n", b"no JSON\n", b"3\n"):
        folder = tmp_path / line.hex()
        folder.mkdir()
        finished = FinishedBatches(folder, {"--ask": ["Where?"]})
        assert finished.open() == 0
        finished.add(0, "", {"cut.jpg": "cut"})
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


def test_threads_behind_the_model_change_nothing(trained, photos, tmp_path, monkeypatch, capsys):
    written = []
    for num_threads in (0, 3):
        monkeypatch.setattr("annexe.inference.job._num_threads", lambda device, n=num_threads: n)
        out = tmp_path / str(num_threads)
        with pytest.raises(SystemExit, match="2"):
            annexe(monkeypatch, *ask_photos(trained, photos, out))
        files = sorted(path for path in out.iterdir() if path.name != ".lock")
        written.append([(path.name, path.read_bytes()) for path in files])
    assert len(written[0]) == 12 + 2
    assert written[1] == written[0]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped; what is done is in"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "set a smaller --batch-size"),
    ],
)
def test_what_ends_a_job_is_one_line(
    trained, photos, tmp_path, monkeypatch, capsys, error, code, message
):
    def end(self, photos):
        yield from answered(self, islice(photos, 2))
        raise error

    answered = Predictor.iterate
    monkeypatch.setattr(Predictor, "iterate", end)
    with pytest.raises(SystemExit, match=str(code)):
        annexe(monkeypatch, *ask_photos(trained, photos / "good-?.jpg", tmp_path / "out"))
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes().count(b"\n") == 2 * 3


# Forms


def test_without_questions_photos_are_analyzed(trained, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    photo = photos / "good-0.jpg"
    annexe(monkeypatch, "predict", trained, photo, "--out", out)
    (record,) = read_records(out / "predictions.jsonl")
    assert isinstance(record, ImageRecord)
    assert f"{photo}: {record.analysis}" in strip_control_codes(capsys.readouterr().out)
    files = {".lock", "good-0-analysis.jpg", "predictions.jsonl", "progress.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    with Image.open(out / "good-0-analysis.jpg") as picture:
        assert picture.height > 180


def test_every_photo_gets_its_questions_of_a_table(
    trained, photos, tmp_path, monkeypatch, capsys, caplog
):
    table = tmp_path / "ask.csv"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        rows = [("good-0.jpg", "Where, exactly?"), ("good-2", "What?"), ("good-0", "Who?")]
        csv.writer(file).writerows([("photo", "question"), *rows, ("gone.jpg", "Where?")])
    out = tmp_path / "out"
    words = ("predict", trained, photos / "good-[012].jpg", "--out", out, "--ask-file", table)
    annexe(monkeypatch, *words, "--ask", "Where?", "--save", "jsonl")
    assert "1 of 4 questions are about no photo that was given: 'gone.jpg' (line 5)" in caplog.text
    _, queries = split_kinds(read_records(out / "predictions.jsonl"))
    assert [(query.image, query.query) for query in queries] == [
        ("good-0", "Where?"),
        ("good-0", "Where, exactly?"),
        ("good-0", "Who?"),
        ("good-1", "Where?"),
        ("good-2", "Where?"),
        ("good-2", "What?"),
    ]
    assert not list(out.glob("*.jpg"))

    # The same table goes on, another does not
    annexe(monkeypatch, *words, "--ask", "Where?", "--save", "jsonl")
    table.write_text("photo,question\ngood-1,What?\n")
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *words, "--ask", "Where?", "--save", "jsonl")
    assert "holds answers with --ask-file" in capsys.readouterr().err


def test_masks_are_saved_as_png(trained, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("predict", trained, photos / "good-0.jpg", "--out", out, "--ask", "Where?", "What?")
    annexe(monkeypatch, *words, "--save", "png", "--options", ALL_SLOTS)
    _, queries = split_kinds(read_records(out / "predictions.jsonl"))
    assert not list(out.glob("*.jpg"))
    files = set()
    for query in queries:
        name = f"good-0-{query.annotation + 1}"
        covered = np.zeros((180, 320), bool)
        for mask in query.masks:
            with Image.open(out / f"{name}-mask-{mask.slot}.png") as file:
                pixels = np.asarray(file)
            assert set(np.unique(pixels)) <= {0, 255}
            assert encode(pixels > 0) == mask.rle
            covered |= pixels > 0
            files.add(f"{name}-mask-{mask.slot}.png")
        with Image.open(out / f"{name}-ids.png") as file:
            ids = np.asarray(file)
        np.testing.assert_array_equal(ids > 0, covered)
        assert set(np.unique(ids)) <= {0, *(mask.slot + 1 for mask in query.masks)}
        files.add(f"{name}-ids.png")
    assert len(files) > len(queries)
    assert {path.name for path in out.glob("*.png")} == files

    # Other forms are another command
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *words, "--save", "png,overlay", "--options", ALL_SLOTS)
    assert "holds answers with --save ['png'], which is now" in capsys.readouterr().err


def test_the_surer_mask_has_the_pixels_of_both():
    left = np.zeros((4, 6), bool)
    left[:, :4] = True
    masks = []
    for slot, mask, score in ((0, left, 0.9), (2, ~left | (np.arange(6) == 3), 0.6)):
        masks.append(PredictedMask(slot=slot, phrase="", score=score, rle=encode(mask)))
    record = QueryRecord(image="photo", annotation=0, query_id=0, answer="", masks=masks)
    ids = id_map(Answer(record, Photo.of(Image.new("RGB", (6, 4)))), (4, 6))
    assert ids.tolist() == [[1, 1, 1, 1, 3, 3]] * 4


def test_time_left_is_logged_where_there_is_no_bar(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter([0, 10, 40, 60])
    monkeypatch.setattr("annexe.terminal.time.perf_counter", lambda: next(clock))
    assert list(with_time_left([[1, 2], [3, 4], [5]], 5, "photos")) == [[1, 2], [3, 4], [5]]
    (record,) = caplog.records
    assert record.getMessage() == "4 of 5 photos, 0.1 a second, 0:00:10 left"


# The same through Python, in batches of any size, and by several processes


@pytest.fixture
def twelve(scenes: Path, tmp_path: Path) -> list[Path]:
    """Twelve photos of several sizes."""
    folder = tmp_path / "twelve"
    folder.mkdir()
    sizes = [(320, 180), (200, 200), (180, 320), (640, 360)]
    for index, path in enumerate(sorted((scenes / "RGB").iterdir())[:12]):
        photo = Image.open(path).resize(sizes[index % len(sizes)])
        photo.save(folder / f"photo-{index:02d}.jpg")
    return sorted(folder.iterdir())


def without_scores(record: Record) -> Record:
    """A copy of a record without the digits of presence, and without masks."""
    if isinstance(record, ImageRecord):
        return record
    return msgspec.structs.replace(record, presence=None, slot_scores=None, masks=[])


@pytest.mark.slow
def test_the_command_line_says_what_python_says(trained, twelve, tmp_path, monkeypatch, capsys):
    questions = ["Where is the mug?", "What does the left hand hold?", "Show both hands."]
    by_size: dict[int, list[Record]] = {}
    for size in (1, 4, 8):
        out = tmp_path / f"batches-of-{size}"
        words = ("predict", trained, twelve[0].parent, "--ask", *questions, "--out", out)
        more = ("--batch-size", size, "--save", "jsonl", "--options", ALL_SLOTS)
        annexe(monkeypatch, *words, *more)
        by_size[size] = read_records(out / "predictions.jsonl")

        predictor = Predictor.from_run(trained, batch_size=size, options=[ALL_SLOTS])
        results = predictor.predict(twelve, questions)
        lines = [line_of(record) for result in results for record in result.to_records()]
        assert (out / "predictions.jsonl").read_text() == "".join(lines)

    # Rounding touches the last digits of scores, and pixels whose logit is all but zero
    alone = by_size[1]
    assert len(alone) == 12 * 4
    for records in (by_size[4], by_size[8]):
        assert list(map(without_scores, records)) == list(map(without_scores, alone))
        _, queries = split_kinds(records)
        for query, expected in zip(queries, split_kinds(alone)[1], strict=True):
            assert query.presence == pytest.approx(expected.presence, abs=2e-6)
            assert [mask.slot for mask in query.masks] == [mask.slot for mask in expected.masks]
            for mask, other in zip(query.masks, expected.masks, strict=True):
                assert (decode(mask.rle) != decode(other.rle)).sum() <= 2


class SecondOfTwo:
    """The second of two processes, which does two batches until the job is killed."""

    rank = 1
    count = 2
    is_main = False

    def __init__(self, run) -> None:
        pass

    def from_main(self, work):
        return work()

    def require_shared(self, folder: Path, setting: str) -> None:
        pass

    def share(self, items: list[int]) -> list[int]:
        return items[1::2][:2]

    def gather(self, items: list[str]) -> list[str]:
        raise Killed


def test_one_process_goes_on_with_what_several_left(trained, photos, tmp_path, monkeypatch, capsys):
    def words(out: Path) -> list[object]:
        return [*ask_photos(trained, photos / "good-?.jpg", out), "run.batch_size=1"]

    # Photos 1 and 3 are done, and half of a line of the next one
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("annexe.tools.predict.Processes", SecondOfTwo)
        with pytest.raises(Killed):
            annexe(patched, *words(out))
    part = out / "parts" / "rank-00001"
    with (part / "predictions.jsonl").open("a") as file:
        file.write('{"kind": "ima')
    assert not (out / "predictions.jsonl").read_bytes()

    annexe(monkeypatch, *words(out))
    assert "going on after 2 of 6 batches" in capsys.readouterr().out
    annexe(monkeypatch, *words(tmp_path / "whole"))
    for name in ("predictions.jsonl", "progress.jsonl", "good-3-2.jpg"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "parts").exists()


def test_parts_that_other_machines_keep_are_named(trained, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("annexe.tools.predict.Processes", SecondOfTwo)
        patched.setattr(SecondOfTwo, "is_main", True)
        patched.setattr(SecondOfTwo, "gather", lambda self, items: items)
        with pytest.raises(SystemExit, match="2"):
            annexe(patched, *ask_photos(trained, photos / "good-?.jpg", out))
    assert "batch 0 is not in" in capsys.readouterr().err


def torchrun(*words: object, restarts: int = 0) -> list[str]:
    """The command of two processes, which are started again so many times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", str(restarts)]
    return [*command, "-m", "annexe", *map(str, words)]


@pytest.fixture
def many(scenes: Path, tmp_path: Path) -> Path:
    """A folder of 101 small photos."""
    folder = tmp_path / "many"
    folder.mkdir()
    scene = Image.open(next((scenes / "RGB").iterdir()))
    for index in range(101):
        photo = scene.crop((index * 8, index * 4, index * 8 + 480, index * 4 + 360))
        photo.resize((64, 48)).save(folder / f"photo-{index:03d}.png")
    return folder


@pytest.mark.slow
def test_two_processes_write_what_one_does(trained, many, tmp_path, monkeypatch, capsys):
    """One of them is killed, and torchrun starts both again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def words(name: str) -> list[object]:
        given = ("predict", trained, many, "--ask", "Where?", "--out", tmp_path / name)
        return [*given, "--batch-size", 2, "--save", "jsonl", "--options", ALL_SLOTS]

    annexe(monkeypatch, *words("one"))
    expected = (tmp_path / "one" / "predictions.jsonl").read_bytes()
    assert expected.count(b"\n") == 2 * 101

    # The second process is killed in the middle of its share
    part = tmp_path / "killed" / "parts" / "rank-00001"
    journal = part / "progress.jsonl"
    job = subprocess.Popen(
        torchrun(*words("killed"), restarts=1),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while job.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 3):
        time.sleep(0.01)
    os.kill(int((part / ".lock").read_text().split()[1]), signal.SIGKILL)
    assert not (tmp_path / "killed" / "predictions.jsonl").read_bytes()
    output = job.communicate()[0].decode()
    assert job.returncode == 0, output[-2000:]
    assert re.search(r"going on after \d+ of 51 batches", output)
    assert "Traceback" not in output
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == expected
    files = {".lock", "predictions.jsonl", "progress.jsonl"}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == files


@pytest.mark.slow
def test_two_hundred_photos_of_which_seven_are_bad(trained, photos, tmp_path, monkeypatch, capsys):
    for index in range(6, 193):
        source = photos / f"good-{index % 6}.jpg"
        Image.open(source).resize((64, 48)).save(photos / f"good-{index}.png")
    out = tmp_path / "out"
    words = ("predict", trained, photos, "--ask", "Where?", "--out", out, "--save", "jsonl")
    with pytest.raises(SystemExit, match="2"):
        annexe(monkeypatch, *words, "--batch-size", 8)
    error = capsys.readouterr().err
    assert "193 of 200 photos were answered, not these 7" in error
    assert all(f"{name}'" in error for name in REASONS)
    images, queries = split_kinds(read_records(out / "predictions.jsonl"))
    assert len(images) == len(queries) == 193
