"""Comparing two systems: paired, on the queries that both answered, by video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from annexe.evaluation.records import Record
from annexe.evaluation.scoring import score
from annexe.evaluation.truth import Truth
from tests.test_scoring import annexe, flawed_records, truth_of, write

__all__ = ["annexe"]  # a fixture


@pytest.fixture(scope="module")
def truth(scenes: Path) -> Truth:
    return truth_of(scenes)


@pytest.fixture(scope="module")
def flawed(truth: Truth) -> list[Record]:
    return flawed_records(truth)


def perfected(records: list[Record], truth: Truth) -> list[Record]:
    perfect = []
    for record in records:
        if record["kind"] == "query":
            annotation, masks = (
                truth.annotations(record["image"])[record["annotation"]],
                truth.masks(record["image"]),
            )
            own = [{"slot": slot, "rle": masks[i]} for slot, i in annotation.slots.items()]
            record = {**record, "answer": annotation.answer, "masks": own}
        perfect.append(record)
    return perfect


def test_a_better_system_is_found_better(annexe, scenes, truth, flawed, tmp_path):
    first, second = (
        write(tmp_path / "a.jsonl", flawed),
        write(tmp_path / "b.jsonl", perfected(flawed, truth)),
    )
    given = (
        "--data-root",
        scenes,
        "--split",
        "test",
        "--workers",
        1,
        "--json",
        tmp_path / "out" / "compared.json",
    )
    printed = annexe("compare", first, second, *given)
    compared = json.loads((tmp_path / "out" / "compared.json").read_text())
    standard, num_queries = (
        score(flawed, truth),
        sum(record["kind"] == "query" for record in flawed),
    )
    assert (
        compared["num_queries"] == [num_queries, num_queries]
        and compared["num_common_queries"] == num_queries
    )
    assert compared["num_videos"] == len({stem.rpartition("_")[0] for stem in truth.dataset.stems})
    for name, row in compared["metrics"].items():
        assert row["first"] == pytest.approx(standard[name], abs=1e-12) and row["second"] == 1, name
        assert row["difference"] == pytest.approx(1 - row["first"])
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] < 0.01, name
    assert f"{num_queries} queries of" in printed and "grounding/ciou" in printed


def test_the_queries_of_both_alone_count(annexe, scenes, truth, flawed, tmp_path):
    queries = [record for record in flawed if record["kind"] == "query"]
    first, second = (
        write(tmp_path / "a.jsonl", queries[:-40]),
        write(tmp_path / "b.jsonl", queries[30:]),
    )
    common = queries[30:-40]
    given = (
        "--data-root",
        scenes,
        "--split",
        "test",
        "--workers",
        1,
        "--json",
        tmp_path / "compared.json",
    )
    printed = annexe("compare", first, second, *given)
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared["num_common_queries"] == len(common)
    for name, row in compared["metrics"].items():
        assert row["first"] == row["second"] == pytest.approx(score(common, truth)[name], abs=1e-12)
        assert (row["low"], row["high"], row["p"]) == (0, 0, 1)
    assert (
        f"{len(common)} queries" in printed
        and f"A has {len(queries) - 40}, B {len(queries) - 30}" in printed
    )


def test_swapping_the_systems_turns_the_signs(annexe, scenes, truth, flawed, tmp_path):
    files = (
        write(tmp_path / "a.jsonl", flawed),
        write(tmp_path / "b.jsonl", perfected(flawed, truth)),
    )
    for name, (first, second) in {"ab": files, "ba": files[::-1]}.items():
        out = tmp_path / f"{name}.json"
        annexe(
            "compare",
            first,
            second,
            "--data-root",
            scenes,
            "--split",
            "test",
            "--workers",
            1,
            "--json",
            out,
        )
    ab, ba = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("ab", "ba")
    )
    for name, row in ab.items():
        assert ba[name]["difference"] == -row["difference"] and ba[name]["p"] == row["p"]
        assert ba[name]["low"] == pytest.approx(-row["high"])


def test_nothing_in_common_is_an_error(annexe, scenes, flawed, tmp_path):
    queries = [record for record in flawed if record["kind"] == "query"]
    first, second = (
        write(tmp_path / "a.jsonl", queries[:9]),
        write(tmp_path / "b.jsonl", queries[9:20]),
    )
    assert "no query in common" in annexe(
        "compare", first, second, "--data-root", scenes, "--split", "test"
    )


def test_one_video_gives_differences_alone(annexe, scenes, flawed, tmp_path):
    video = flawed[0]["image"].rpartition("_")[0]
    file = write(
        tmp_path / "a.jsonl",
        [record for record in flawed if record["image"].rpartition("_")[0] == video],
    )
    printed = annexe(
        "compare", file, file, "--data-root", scenes, "--split", "test", "--workers", 1
    )
    assert "A single video gives no interval" in printed
