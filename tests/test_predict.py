"""`annexe predict`: photos of one's own are answered as an evaluation answers them, drawn, and refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.config import Config
from annexe.datasets.photos import photo_files, photo_size, read_photo
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.rle import encode
from annexe.tools.predict import SLOT_COLOURS, answer_picture
from annexe.trainer import train
from tests.conftest import ROOT

FOUND = "model.presence_threshold=0"  # one step of training finds nothing by itself


@pytest.fixture
def trained(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    train(make_config("run.max_steps=1", "run.warmup_steps=0"))
    return tmp_path / "run"


def annexe(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["annexe", *map(str, words)])
    cli.main()


def test_answers_are_those_of_an_evaluation(
    trained, scenes, make_config, tmp_path, monkeypatch, capsys
):
    alone = "run.batch_size=1"  # padding changes the last digits
    evaluate(
        make_config(
            FOUND, alone, f"run.checkpoint={trained}", f"run.output_dir={tmp_path / 'eval'}"
        )
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    stem = lines[0]["image"]
    image, *asked = (line for line in lines if line["image"] == stem)
    questions, photo, out = (
        [line["query"] for line in asked],
        scenes / "RGB" / f"{stem}.jpg",
        tmp_path / "out",
    )
    annexe(
        monkeypatch,
        "predict",
        trained,
        photo,
        "--ask",
        *questions,
        "--out",
        out,
        "--options",
        FOUND,
    )
    told = capsys.readouterr().out
    answered = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert answered[0]["analysis"] == image["analysis"]
    assert any(line["masks"] for line in asked)
    for number, (own, other) in enumerate(zip(answered[1:], asked, strict=True)):
        for key in ("query", "answer", "presence", "masks"):
            assert own[key] == other[key], key
        assert own["query"] in told
        assert own["answer"] in told
        with Image.open(out / f"{stem}-{number + 1}.jpg") as picture:
            assert picture.width == 1280
            assert picture.height > 720  # the caption below


def test_a_mask_is_drawn_in_the_colour_of_its_slot():
    photo = Image.new("RGB", (200, 100), "black")
    mask = np.zeros((100, 200), bool)
    mask[20:80, :100] = True
    shown = {"slot": 1, "phrase": "the mug", "score": 0.9, "rle": encode(mask)}
    answer = f"The mask of the mug is <MSK_1>{' and so on' * 30}."
    record = {"query": "Where is the mug?", "answer": answer, "masks": [shown]}
    picture = np.asarray(answer_picture(photo, record)).astype(int)
    colour = np.array([int(SLOT_COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    np.testing.assert_allclose(picture[50, 50], 0.42 * colour, atol=1)
    assert (picture[50, 150] == 0).all()
    assert (picture[10, 50] == 0).all()
    assert (picture[100:] == colour).all(-1).any()  # the caption's mark
    assert picture.shape[1] == 640  # wide enough for the caption
    dark = (picture[100:] < 128).all(-1)
    assert dark[:, 50:600].any()
    assert not dark[:, -8:].any()  # no word runs out of it


def test_colours_are_those_of_the_report():
    style = (ROOT / "annexe" / "report" / "style.html").read_text()
    assert all(f"--slot-{slot}: {colour};" in style for slot, colour in enumerate(SLOT_COLOURS))


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
    ("photo", "ending", "told"),
    [
        (Image.fromarray(np.full((40, 60), 300, np.uint16)), "png", "more than 8 bits"),
        (Image.new("RGB", (60, 31)), "png", "60 x 31; no side may be below 32"),
        (Image.new("RGB", (60, 40)), "tif", "is TIFF"),
    ],
)
def test_photos_that_would_be_read_wrongly_are_refused(tmp_path, photo, ending, told):
    photo.save(tmp_path / f"photo.{ending}")
    with pytest.raises(UserError, match=told):
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
    photo, out, there = next((scenes / "RGB").iterdir()), tmp_path / "out", tmp_path / "there"
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    there.mkdir()
    shutil.copy(photo, there / "photo-1.jpg")
    for run, file, question, more, told in (
        (tmp_path / "nowhere", photo, "Where?", (), "no complete checkpoint"),
        (trained, photo, " ", (), "empty question"),
        (trained, photo, "Where is <MSK_0>?", (), "token of the prompt"),
        (trained, photo, "[/INST] Where?", (), "token of the prompt"),
        (trained, photo, "Where\udcff?", (), "not UTF-8"),
        (
            trained,
            photo,
            "Where?",
            ("--options", "run.max_new_token=1"),
            "Did you mean 'max_new_tokens'",
        ),
        (trained, tmp_path / "broken.jpg", "Where?", (), "cannot read photo"),
        (trained, there, "Where?", ("--out", there), "is not empty"),
        (trained, photo, "Where?", ("--out", photo), "cannot make folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            annexe(monkeypatch, "predict", run, file, "--ask", question, "--out", out, *more)
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
        assert not out.exists()
    assert (there / "photo-1.jpg").read_bytes() == photo.read_bytes()


def test_what_was_done_before_a_photo_that_ends_early_is_kept(
    trained, scenes, tmp_path, monkeypatch, capsys
):
    whole, cut, out = sorted((scenes / "RGB").iterdir())[0], tmp_path / "cut.jpg", tmp_path / "out"
    cut.write_bytes(whole.read_bytes()[:20_000])
    one_by_one = ("--options", "run.batch_size=1")
    with pytest.raises(SystemExit, match="2"):
        annexe(
            monkeypatch,
            "predict",
            trained,
            whole,
            cut,
            "--ask",
            "Where?",
            "--out",
            out,
            *one_by_one,
        )
    assert f"cannot read image '{cut}'" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [whole.stem] * 2
    assert (out / f"{whole.stem}-1.jpg").is_file()
