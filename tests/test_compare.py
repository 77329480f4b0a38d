"""Comparing two systems: paired, on the queries that both answered, by video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from annexe.evaluation.records import PredictedMask, QueryRecord, Record, split_kinds
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


@pytest.fixture(scope="module")
def queries(flawed: list[Record]) -> list[QueryRecord]:
    return split_kinds(flawed)[1]


@pytest.fixture
def data(scenes: Path) -> tuple[object, ...]:
    """The options that name the truth."""
    return ("--data-root", scenes, "--split", "test", "--workers", 1)


def perfected(records: list[Record], truth: Truth) -> list[Record]:
    perfect: list[Record] = []
    for record in records:
        if isinstance(record, QueryRecord):
            annotation = truth.annotations(record.image)[record.annotation]
            true_masks = truth.masks(record.image)
            masks = []
            for slot, mask_id in annotation.slots.items():
                masks.append(PredictedMask(slot=slot, rle=true_masks[mask_id]))
            record = replace(record, answer=annotation.answer, masks=masks)
        perfect.append(record)
    return perfect


def test_a_better_system_is_found_better(annexe, data, truth, flawed, queries, tmp_path):
    first = write(tmp_path / "a.jsonl", flawed)
    second = write(tmp_path / "b.jsonl", perfected(flawed, truth))
    out = tmp_path / "out" / "compared.json"
    printed = annexe("compare", first, second, *data, "--json", out)
    compared = json.loads(out.read_text())
    standard = score(flawed, truth)
    num_queries = len(queries)
    assert compared["num_queries"] == [num_queries, num_queries]
    assert compared["num_common_queries"] == num_queries
    assert compared["num_videos"] == len({stem.rpartition("_")[0] for stem in truth.dataset.stems})
    for name, row in compared["metrics"].items():
        assert row["first"] == pytest.approx(standard[name], abs=1e-12) and row["second"] == 1, name
        assert row["difference"] == pytest.approx(1 - row["first"])
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] < 0.01, name
    assert f"{num_queries} queries of" in printed and "grounding/ciou" in printed


def test_the_queries_of_both_alone_count(annexe, data, truth, queries, tmp_path):
    first = write(tmp_path / "a.jsonl", queries[:-40])
    second = write(tmp_path / "b.jsonl", queries[30:])
    common = queries[30:-40]
    printed = annexe("compare", first, second, *data, "--json", tmp_path / "compared.json")
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared["num_common_queries"] == len(common)
    standard = score(common, truth)
    for name, row in compared["metrics"].items():
        assert row["first"] == row["second"] == pytest.approx(standard[name], abs=1e-12)
        assert (row["low"], row["high"], row["p"]) == (0, 0, 1)
    assert f"{len(common)} queries" in printed
    assert f"A has {len(queries) - 40}, B {len(queries) - 30}" in printed


def test_swapping_the_systems_turns_the_signs(annexe, data, truth, flawed, tmp_path):
    first = write(tmp_path / "a.jsonl", flawed)
    second = write(tmp_path / "b.jsonl", perfected(flawed, truth))
    annexe("compare", first, second, *data, "--json", tmp_path / "ab.json")
    annexe("compare", second, first, *data, "--json", tmp_path / "ba.json")
    ab = json.loads((tmp_path / "ab.json").read_text())["metrics"]
    ba = json.loads((tmp_path / "ba.json").read_text())["metrics"]
    for name, row in ab.items():
        assert ba[name]["difference"] == -row["difference"] and ba[name]["p"] == row["p"]
        assert ba[name]["low"] == pytest.approx(-row["high"])


def test_nothing_in_common_is_an_error(annexe, data, queries, tmp_path):
    first = write(tmp_path / "a.jsonl", queries[:9])
    second = write(tmp_path / "b.jsonl", queries[9:20])
    assert "no query in common" in annexe("compare", first, second, *data)


def test_one_video_gives_differences_alone(annexe, data, flawed, tmp_path):
    video = flawed[0].image.rpartition("_")[0]
    of_video = [record for record in flawed if record.image.rpartition("_")[0] == video]
    file = write(tmp_path / "a.jsonl", of_video)
    printed = annexe("compare", file, file, *data)
    assert "A single video gives no interval" in printed
