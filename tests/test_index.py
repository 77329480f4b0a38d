"""The index holds what the files hold and is rebuilt when they change or it is damaged; lists."""

from __future__ import annotations

import codecs
import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annexe.datasets import annotation_index as index_module
from annexe.datasets.annotation_index import Index, StaleIndex, index_file, open_index
from annexe.datasets.annotations import read_annotations
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.image_names import match_stems, read_subsets, subset_files
from annexe.datasets.pixels import PIXEL_FILES
from annexe.errors import UserError
from tests.test_datasets import annotation, write_image

NUM_IMAGES = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six small images, with one to three annotations of their own each."""
    for image in range(NUM_IMAGES):
        entries = []
        for k in range(image % 3 + 1):
            entry = annotation(answer=f"Answer {image} {k}: é <MSK_0>.")
            entry["questions"] = [{"query": f"Wording {image} {k} {q}?", "id": q} for q in range(3)]
            entry["questions"][1] |= {"is_sentence": 1, "id": "one"}
            entries.append(entry)
        write_image(tmp_path / "data", entries, stem=stem_of(image))
    return tmp_path / "data"


def stem_of(frame: int) -> str:
    return f"ZY20210800001_H1_C11_N07_S185_s02_T2_{frame:05d}"


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "dataset_split" / "train"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Annotation files that were read; it grows as more are."""
    read: list[Path] = []

    def recording(path: Path) -> list:
        read.append(path)
        return read_annotations(path)

    monkeypatch.setattr(index_module, "read_annotations", recording)
    return read


def open_set(root: Path, split: str = "train", **settings: str) -> EgoIRGBench:
    return EgoIRGBench(split, 56, 0, None, data_root=str(root), **settings)


def contents(index: Index) -> list[list]:
    return [index.annotations(row) for row in range(len(index.stems))]


def test_it_holds_what_the_files_hold(scenes: Path) -> None:
    for split in ("train", "val", "test"):
        paths = sorted((scenes / "dataset_split" / split).glob("*.json"))
        index = open_index(scenes / "dataset_split" / split)
        assert index.stems == [path.stem for path in paths]
        assert contents(index) == [read_annotations(path) for path in paths]
        for num_slots, entries in zip(index.num_slots, contents(index), strict=True):
            used = set().union(*(entry.slots for entry in entries))
            assert num_slots == max(used, default=-1) + 1


def test_questions_keep_whether_they_are_sentences(root: Path) -> None:
    questions = open_set(root).annotations[0][0].questions
    assert [question["is_sentence"] for question in questions] == [False, True, False]


def test_second_opening_reads_no_annotation_file(root: Path, built: list[Path]) -> None:
    first = open_set(root)
    assert len(built) == NUM_IMAGES
    second = open_set(root)
    assert len(built) == NUM_IMAGES
    assert list(first.annotations) == list(second.annotations) and first.texts() == second.texts()


@pytest.mark.parametrize("change", ["content", "time", "new", "gone", "renamed"])
def test_it_follows_the_files(change: str, root: Path, folder: Path, built: list[Path]) -> None:
    open_set(root)
    path = folder / f"{stem_of(2)}.json"
    content = path.read_text()
    if change == "content":
        path.write_text(content.replace("Answer 2 0", "Other answer"))
    elif change == "time":  # as many bytes as before
        path.write_text(content.replace("Answer 2 0", "ANSWER 2 0"))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    elif change == "new":
        write_image(root, [annotation()], stem=stem_of(17))
    elif change == "gone":
        path.unlink()
    else:
        write_image(root, [annotation()], stem=stem_of(18))
        path.rename(folder / f"{stem_of(18)}.json")
    built.clear()
    dataset = open_set(root)
    paths = sorted(folder.glob("*.json"))
    assert len(built) == len(paths)
    assert dataset.stems == [path.stem for path in paths]
    assert list(dataset.annotations) == [read_annotations(path) for path in paths]


def test_damaged_index_is_made_again(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "annexe")
    good = contents(open_index(folder))
    path = index_file(folder)
    content = path.read_bytes()
    size = len(content)
    random = np.random.default_rng(0)
    damaged = [b"", b"annexe", content[:-1], content + b"\x00", content[size // 2 :], bytes(size)]
    damaged += [content[: int(length)] for length in random.integers(size, size=20)]
    for position in random.integers(size, size=40):
        flipped = bytes([content[position] ^ 0x41])
        damaged.append(content[:position] + flipped + content[position + 1 :])
    for case, wrong in enumerate(damaged):
        path.write_bytes(wrong)
        caplog.clear()
        assert contents(open_index(folder)) == good, case
        assert "damaged" in caplog.text and str(path) in caplog.text, case
        assert path.read_bytes() == content
    left = [file for file in path.parent.iterdir() if file.name.startswith(path.stem)]
    assert [file.suffix for file in left] == [".index"]


def test_a_build_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEXE_CACHE", str(folder.parent / "cache"))

    def killed(path: Path) -> list:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module, "read_annotations", killed)
    with pytest.raises(KeyboardInterrupt):
        open_index(folder)
    assert list((folder.parent / "cache" / "index").iterdir()) == []


def _open(folder: Path) -> list[list]:
    return contents(open_index(folder))


def test_processes_may_build_at_once(folder: Path) -> None:
    expected = [read_annotations(path) for path in sorted(folder.glob("*.json"))]
    with get_context("fork").Pool(4) as pool:
        assert pool.map(_open, [folder] * 12, chunksize=1) == [expected] * 12
    assert len(list(index_file(folder).parent.glob(f"{index_file(folder).stem}*"))) == 1


def test_a_loader_worker_maps_the_same_file(root: Path, folder: Path, built: list[Path]) -> None:
    dataset = open_set(root)
    built.clear()
    copy = pickle.loads(pickle.dumps(dataset))
    assert built == [] and list(copy.annotations) == list(dataset.annotations)
    assert copy[0, 1].turns == dataset[0, 1].turns
    with pytest.raises(StaleIndex):
        Index(index_file(folder), folder, "another state")


def test_folders_do_not_share_an_index(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    one = root / "dataset_split" / "train"
    other = tmp_path / "copy" / "dataset_split" / "train"
    assert index_file(one) != index_file(other)
    monkeypatch.chdir(root)
    assert index_file(Path("dataset_split/train")) == index_file(one)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ANNEXE_CACHE": "/a"}, "/a/index"),
        ({"ANNEXE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/annexe/index"),
        ({"ANNEXE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/annexe/index"),
    ],
)
def test_where_the_index_is_stored(
    settings: dict[str, str], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert str(index_file(folder).parent) == expected


def test_a_cache_that_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ANNEXE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write the index.*ANNEXE_CACHE") as caught:
        open_set(root)
    assert "\n" not in str(caught.value)


def test_a_read_only_data_root_stays_as_it_is(root: Path) -> None:
    before = sorted(root.rglob("*"))
    open_set(root)
    assert sorted(root.rglob("*")) == before


def test_question_by_key(root: Path) -> None:
    dataset = open_set(root)
    for stem, entries in zip(dataset.stems, dataset.annotations, strict=True):
        for index, entry in enumerate(entries):
            for question in entry.questions:
                assert dataset.question(stem, index, question["id"]) == question
    for key in (("nothing", 0, 0), (stem_of(0), 0, "1"), (stem_of(0), 0, 99)):
        with pytest.raises(KeyError):
            dataset.question(*key)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            dataset.question(stem_of(0), index, 0)


def test_opening_and_looking_up_are_fast(tmp_path: Path) -> None:
    """A twentieth of the full size, with room for a busy machine.

    docs/data.md has the figures of the full size.
    """
    questions = [{"query": f"Wording {q}?", "id": q} for q in range(20)]
    write_image(tmp_path, [annotation(questions=questions)] * 4, stem="source")
    folder = tmp_path / "dataset_split" / "train"
    (source,) = folder.iterdir()
    for frame in range(1000):
        for name, ending in PIXEL_FILES:
            pixels = tmp_path / name
            os.link(pixels / f"{source.stem}{ending}", pixels / f"{stem_of(frame)}{ending}")
        shutil.copyfile(source, folder / f"{stem_of(frame)}.json")
    open_set(tmp_path)
    start = time.process_time()
    dataset = open_set(tmp_path)
    assert time.process_time() - start < 0.5
    start = time.process_time()
    for frame in range(1000):
        dataset.question(stem_of(frame), 3, 19)
    assert time.process_time() - start < 0.5


def test_fingerprint(root: Path) -> None:
    before = open_set(root).fingerprint()
    assert before == open_set(root).fingerprint()
    path = root / "depth" / f"{stem_of(3)}.png"
    path.write_bytes(path.read_bytes() + b"\x00")
    changed = open_set(root).fingerprint()
    assert changed != before
    (root / "dataset_split" / "train" / f"{stem_of(3)}.json").unlink()
    assert open_set(root).fingerprint() not in (before, changed)


def swap_words(root: Path) -> None:
    path = root / "dataset_split" / "train" / f"{stem_of(3)}.json"
    path.write_text(path.read_text().replace("Wording", "Warding", 1))


def swap_targets(root: Path) -> None:
    path = root / "dataset_split" / "train" / f"{stem_of(3)}.json"
    path.write_text(path.read_text().replace('"masks_idx": [2', '"masks_idx": [1', 1))


def swap_ids(root: Path) -> None:
    path = root / "mask" / f"{stem_of(3)}.png"
    ids = np.asarray(Image.open(path))
    Image.fromarray(np.array([0, 2, 1], np.uint8)[ids]).save(path, compress_level=0)


def swap_palette(root: Path) -> None:
    """The colors of two ids, before and after as large as each other."""
    path = root / "mask" / f"{stem_of(3)}.png"
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes([1, 2, 3, 4, 5, 6]), bytes([4, 5, 6, 1, 2, 3])))


@pytest.mark.parametrize("edit", [swap_words, swap_targets, swap_ids, swap_palette])
def test_fingerprint_covers_contents(edit: Callable[[Path], None], root: Path) -> None:
    """Edits that leave every size as it was."""
    path = root / "mask" / f"{stem_of(3)}.png"
    ids = Image.open(path)
    if edit is swap_palette:
        ids = ids.convert("P")
        ids.putpalette([0, 0, 0, 1, 2, 3, 4, 5, 6])
    ids.save(path, compress_level=0)
    before = open_set(root).fingerprint()
    files = [file for file in root.rglob("*.*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    edit(root)
    assert [file.stat().st_size for file in files] == sizes
    assert open_set(root).fingerprint() != before


def test_fingerprint_is_that_of_a_copy(root: Path, folder: Path, tmp_path: Path) -> None:
    """Neither times of files, nor where they are, nor how JSON is written plays a part."""
    before = open_set(root).fingerprint()
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy" / "dataset_split" / "train").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()), indent=2))
    assert open_set(tmp_path / "copy").fingerprint() == before


def test_wordings_that_are_never_evaluated_are_counted(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / f"{stem_of(1)}.json"
    entries = json.loads(path.read_text())
    entries[0]["questions"][2]["id"] = 0
    path.write_text(json.dumps(entries))
    for _ in range(2):  # the index is written, then read
        caplog.clear()
        dataset = open_set(root)
        assert "split 'train': 1 wordings have the id of an earlier one" in caplog.text
    assert len(dataset.evaluation_sample(1, "all").turns) == 5


# Lists


@pytest.fixture
def lists(root: Path, tmp_path: Path) -> Iterator[Path]:
    """Images 4 and 5 lie in val on disk; the lists put 5 and 0 into train, 4 into test."""
    (root / "dataset_split" / "val").mkdir()
    for frame in (4, 5):
        path = root / "dataset_split" / "train" / f"{stem_of(frame)}.json"
        path.rename(root / "dataset_split" / "val" / path.name)
    out = tmp_path / "lists"
    out.mkdir()
    (out / "train.txt").write_text(f"{stem_of(5)}\n\n{stem_of(0)}\n")
    (out / "test.txt").write_text(f"{stem_of(4)}\n")
    return out


def test_split_lists(root: Path, lists: Path) -> None:
    train = open_set(root, "train", split_dir=str(lists))
    test = open_set(root, "test", split_dir=str(lists))
    assert train.stems == [stem_of(0), stem_of(5)] and test.stems == [stem_of(4)]
    answers = [annotations[0].answer for annotations in train.annotations]
    assert answers == ["Answer 0 0: é <MSK_0>.", "Answer 5 0: é <MSK_0>."]
    assert train[0, 1].stem == stem_of(5) and train.fingerprint() != open_set(root).fingerprint()
    assert [annotations[0].answer for annotations in test.annotations_of("train")] == answers
    assert len(test.annotations_of("val")) == 0


def test_exclude(root: Path, lists: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "annexe")
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"{stem_of(0)}\n{stem_of(2)}\n{stem_of(4)}\n")
    dataset = open_set(root, exclude=str(exclude))
    assert dataset.stems == [stem_of(1), stem_of(3)]
    assert "leaves out 2 of 4 images of split 'train'" in caplog.text
    listed = open_set(root, split_dir=str(lists), exclude=str(exclude))
    assert listed.stems == [stem_of(5)]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"quarantine": [stem_of(1), stem_of(5)], "problems": []}))
    assert open_set(root, exclude=str(report)).stems == [stem_of(0), stem_of(2), stem_of(3)]


def test_an_excluded_image_may_be_broken(root: Path, folder: Path, tmp_path: Path) -> None:
    (folder / f"{stem_of(1)}.json").write_text("[{")
    (root / "mask" / f"{stem_of(2)}.png").unlink()
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"{stem_of(1)}\n")
    with pytest.raises(UserError, match=f"{stem_of(1)}.json' is not JSON"):
        open_set(root)
    with pytest.raises(UserError, match=f"missing file .*{stem_of(2)}.png"):
        open_set(root, exclude=str(exclude))
    exclude.write_text(f"{stem_of(1)}\n{stem_of(2)}\n")
    assert len(open_set(root, exclude=str(exclude))) == NUM_IMAGES - 2


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le with its mark")
FORMS = ("{}\n", "{}\r\n", "{}\r", " {}\t\n\n", "{}.jpg\n", "RGB/{}.JPG\n", "mask\\{}.png\r\n")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", FORMS)
def test_lists_as_other_programs_write_them(
    form: str, encoding: str, root: Path, tmp_path: Path
) -> None:
    text = "".join(form.format(stem_of(frame)) for frame in (0, 2, 2))
    if encoding.endswith("mark"):
        content = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    else:
        content = text.encode(encoding)
    (tmp_path / "train.txt").write_bytes(content)
    chosen = [stem_of(0), stem_of(2)]
    assert open_set(root, split_dir=str(tmp_path)).stems == chosen
    left = open_set(root, exclude=str(tmp_path / "train.txt")).stems
    assert sorted([*left, *chosen]) == [stem_of(frame) for frame in range(NUM_IMAGES)]
    (root / "subsets").mkdir()
    shutil.copy(tmp_path / "train.txt", root / "subsets" / "some.txt")
    assert read_subsets(root) == [("some", chosen, [])]


def test_stems_with_points(root: Path) -> None:
    """What looks like an ending may be a part of the name."""
    known = {"a.png", "b"}
    assert match_stems(["a.png", "b.png", "b", "c.png", "a"], known) == (
        ["a.png", "b"],
        ["c.png", "a"],
    )


def test_what_a_subset_does_not_use_is_told(root: Path) -> None:
    (root / "subsets").mkdir()
    (root / "subsets" / "some.txt").write_text(f"# mine\n{stem_of(1)}\nnobody.jpg\n")
    (root / "subsets" / "some.csv").write_text(stem_of(2))
    assert read_subsets(root) == [("some", [stem_of(1)], ["# mine", "nobody.jpg"])]
    assert subset_files(root)[1] == ["some.csv"]


def test_files_that_a_split_does_not_use_are_told(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / f"{stem_of(1)}.json").rename(folder / f"{stem_of(1)}.JSON")
    (folder / ".DS_Store").touch()
    (folder / f"._{stem_of(2)}.json").write_bytes(b"\0\5\x16")
    assert len(open_set(root)) == NUM_IMAGES - 1
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"1 files ignored, such as '{stem_of(1)}.JSON'" in record.getMessage()


@pytest.mark.parametrize(
    ("setting", "content", "part"),
    [
        ("exclude", "\x00a\x00b", "zero bytes"),
        ("exclude", "\xff\xfea", "byte 2 is not UTF-16"),
        ("exclude", f"{stem_of(0)}.tiff", "names 1 images that"),
        ("exclude", "a" * 5000, "names 1 images that"),
        ("exclude", "nobody\n", "names 1 images that"),
        ("exclude", "\n".join(map(stem_of, range(NUM_IMAGES))), "is empty"),
        ("exclude", None, "datasets.ego_irgbench.exclude: cannot read"),
        ("exclude", "\xff", "no list of stems"),
        ("split_dir", f"{stem_of(0)}\nnobody\nno one\n", "names 2 images that"),
        ("split_dir", "", "is empty"),
        ("split_dir", None, "split 'train' has no list"),
    ],
)
def test_wrong_list(
    setting: str, content: str | None, part: str, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        open_set(root, **{setting: str(path if setting == "exclude" else tmp_path)})
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"quarantine": 5}', '{"quarantine": "ab"}', '{"quarantine": [5]}', "{"]
)
def test_report_without_quarantine(text: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="no list of stems"):
        open_set(root, exclude=str(tmp_path / "report.json"))


def test_listed_image_in_two_folders(root: Path, lists: Path) -> None:
    splits = root / "dataset_split"
    shutil.copy(splits / "val" / f"{stem_of(5)}.json", splits / "train")
    message = f"'{stem_of(5)}' has annotations in .*train' and in .*val'"
    with pytest.raises(UserError, match=message):
        open_set(root, split_dir=str(lists))
    with pytest.raises(UserError, match="no folder"):
        open_set(root / "nothing", split_dir=str(lists))
