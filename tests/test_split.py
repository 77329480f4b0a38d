"""annexe split: splits share nothing, sizes and categories stay, one seed gives the same lists."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.image_names import CATEGORIES, category, fields, leaks
from annexe.errors import UserError
from annexe.tools.split import split

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def stems(num_videos: int = 600, seed: int = 0) -> list[str]:
    """Videos of random length, with the 16 categories, 12 instances of each and 40 rooms."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(num_videos):
        kind = int(random.choice(list(CATEGORIES)))
        instance = random.integers(12) + 1
        room = random.integers(40) + 1
        camera = random.integers(4) + 1
        layout = random.integers(99)
        video = f"ZY2021080000{camera}_H1_C{kind:02d}_N{instance:02d}_S{room:03d}_s{layout:02d}_T1"
        result += [f"{video}_{frame:05d}" for frame in range(random.integers(1, 16))]
    return sorted(set(result))


@pytest.mark.parametrize("by", ["sequence", "instance", "room"])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_nothing(by: str, seed: int) -> None:
    images = stems()
    lists = split(images, by, SHARES, seed)
    assert sorted(itertools.chain(*lists.values())) == images
    groups = {name: {fields(stem)[by] for stem in listed} for name, listed in lists.items()}
    assert not groups["train"] & groups["val"] and not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]
    shares = leaks(lists)
    for name in ("val", "test"):
        assert shares[name]["sequence"] == shares[name][by] == 0


@pytest.mark.parametrize("by", ["sequence", "instance", "room"])
def test_sizes_and_categories(by: str) -> None:
    images = stems()
    lists = split(images, by, SHARES, 0)
    for name, listed in lists.items():
        assert len(listed) / len(images) == pytest.approx(SHARES[name], abs=0.02)
    if by == "sequence":  # small groups: every category has its share
        sizes = Counter(map(category, images))
        for name, listed in lists.items():
            for kind, count in Counter(map(category, listed)).items():
                assert count / sizes[kind] == pytest.approx(SHARES[name], abs=0.05), (name, kind)


def test_categories_are_in_every_split_where_they_can_be() -> None:
    lists = split(stems(), "instance", SHARES, 0)
    for listed in lists.values():
        assert set(map(category, listed)) == set(CATEGORIES.values())


def test_the_same_seed_gives_the_same_lists() -> None:
    images = stems()
    lists = split(images, "sequence", SHARES, 5)
    assert lists == split(images[::-1], "sequence", SHARES, 5)
    assert lists != split(images, "sequence", SHARES, 6)


def test_few_groups_fill_every_split() -> None:
    images = []
    for instance, size in ((1, 50), (2, 9), (3, 1)):
        video = f"ZY20210800001_H1_C02_N{instance:02d}_S001_s01_T1"
        images += [f"{video}_{frame:05d}" for frame in range(size)]
    sizes = {name: len(listed) for name, listed in split(images, "instance", SHARES, 0).items()}
    assert sizes == {"train": 50, "val": 1, "test": 9}


def test_a_split_that_would_be_empty() -> None:
    images = [f"ZY20210800001_H1_C02_N{instance:02d}_S001_s01_T1_00001" for instance in (1, 2)]
    message = "split 'test' would be empty: the images show 2 different instances"
    with pytest.raises(UserError, match=message):
        split(images, "instance", SHARES, 0)
    lists = split(images, "instance", {"train": 0.5, "val": 0, "test": 0.5}, 0)
    assert {name: len(listed) for name, listed in lists.items()} == {"train": 1, "test": 1}


def test_stems_without_fields() -> None:
    with pytest.raises(UserError, match="1 stems do not follow HOI4D's pattern, such as 'photo'"):
        split([*stems(5), "photo"], "room", SHARES, 0)


# The command


@pytest.fixture
def annexe(command_line: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """Runs `annexe split`; returns exit code and output."""

    def run(*arguments: object) -> tuple[int, str]:
        code, output, errors = command_line("split", *arguments)
        return code, output or errors

    return run


def test_the_data_set_reads_the_lists(
    annexe: Callable[..., tuple[int, str]], scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lists"
    code, output = annexe(scenes, "--by", "instance", "--out", out)
    assert code == 0 and "val: train shows the sequence of 0.0%, the instance of 0.0%" in output
    opened = {}
    for name in ("train", "val", "test"):
        dataset = EgoIRGBench(name, 56, 0, None, data_root=str(scenes), split_dir=str(out))
        opened[name] = dataset.stems
    on_disk = sorted(path.stem for path in (scenes / "dataset_split").rglob("*.json"))
    assert sorted(itertools.chain(*opened.values())) == on_disk
    assert opened["val"] == (out / "val.txt").read_text().split()
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, output = annexe(scenes, "--by", "room", "--out", out)
    assert code == 2 and output.startswith("error: ") and "exists" in output
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_exclude(annexe: Callable[..., tuple[int, str]], scenes: Path, tmp_path: Path) -> None:
    on_disk = sorted(path.stem for path in (scenes / "dataset_split").rglob("*.json"))
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("\n".join(on_disk[:3]))
    out = tmp_path / "lists"
    code, _ = annexe(scenes, "--by", "sequence", "--out", out, "--exclude", exclude)
    assert code == 0
    listed = []
    for path in out.iterdir():
        listed += path.read_text().split()
    assert sorted(listed) == on_disk[3:]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--val", "0.6", "--test", "0.4"), "leave something to train"),
        (("--seed", "-1"), "seed from 0"),
        (("--val", "nan"), "cannot split with --val nan"),
        (("--exclude", "no-file.txt"), "--exclude: cannot read"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    part: str,
    annexe: Callable[..., tuple[int, str]],
    scenes: Path,
    tmp_path: Path,
) -> None:
    code, output = annexe(scenes, "--by", "sequence", "--out", tmp_path / "out", *arguments)
    assert code == 2 and output.startswith("error: ") and part in output and output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_data(annexe: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, output = annexe(tmp_path, "--by", "sequence", "--out", tmp_path / "out")
    assert code == 2 and "holds no SPLIT/*.json" in output and not (tmp_path / "out").exists()
