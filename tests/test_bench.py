"""`annexe bench`: formulas against PyTorch's counter, and records that add up.

Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from annexe.benchmarks.flops import (
    flops_by_counter,
    flops_of_batch,
    flops_of_depth_branch,
    flops_of_language_model,
    flops_of_vit,
    num_attended_pairs,
)
from annexe.benchmarks.machine import scratch_folder
from annexe.benchmarks.random_batch import even_branches, nominal_branches, random_batch
from annexe.benchmarks.random_model import never_end, without_files
from annexe.benchmarks.scaling import beside, read_earlier
from annexe.benchmarks.scoring_speed import random_predictions
from annexe.benchmarks.timing import Timeline, ceiling, percentiles, time_by_section
from annexe.build import build_model, load_config
from annexe.cli import main
from annexe.config import PARTS, Config
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PixelReader
from annexe.errors import UserError
from annexe.evaluation.records import (
    QueryRecord,
    read_predictions,
    require_complete,
    write_records,
)
from annexe.evaluation.truth import Truth
from annexe.models import mask_postprocessing
from annexe.models.annexe import Annexe
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.decode_steps import DraftingStep
from annexe.models.language_model.packed_mask import packed_attention_mask
from annexe.synthetic.generate import generate
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF
from tests.conftest import ROOT, SMALLEST, TINY

FULL = ROOT / "train_configs" / "annexe.yaml"
NO_DATA = "datasets.ego_irgbench.data_root=no/such/folder"

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    """Runs `annexe bench` with the smallest configuration, and gives what it wrote.

    Nothing else may be left on disk.
    """
    working_folder = tmp_path / "here"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    temporary = tmp_path_factory.mktemp("t")  # short: sockets lie in it
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def run(
        action: str, *arguments: object, options: tuple[str, ...] = (NO_DATA,)
    ) -> dict[str, Any]:
        command = ["annexe", "bench", action]
        if action != "metrics":
            command += ["--cfg-path", str(TINY), "--options", *SMALLEST, *options]
        command += [str(word) for word in arguments]
        command += ["--json", str(tmp_path / "bench.json")]
        monkeypatch.setattr(sys, "argv", command)
        main()

        # The words of METEOR are removed when the process ends
        left = [*temporary.iterdir(), *working_folder.iterdir()]
        assert not [path for path in left if not path.name.startswith("annexe_nltk_data")]
        return json.loads((tmp_path / "bench.json").read_text())

    return run


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stems whose files this process decodes."""
    stems: list[str] = []
    decode = PixelReader._decode

    def counted_decode(reader: PixelReader, stem: str, ids: Collection[int]) -> Any:
        stems.append(stem)
        return decode(reader, stem, ids)

    monkeypatch.setattr(PixelReader, "_decode", counted_decode)
    return stems


def on_meta(config: Config) -> Annexe:
    config, tokenizer, _ = without_files(config)
    return build_model(config.model, tokenizer, torch.device("meta"), bf16=True)


def assert_adds_up(sections: dict[str, dict[str, float]]) -> None:
    """Parts of a step make up the step."""
    parts = [section for name, section in sections.items() if name != "all"]
    assert sum(part["ms"] for part in parts) == pytest.approx(sections["all"]["ms"])
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert sections["all"]["share"] == pytest.approx(1)


def assert_ordered(times: dict[str, float]) -> None:
    assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"] <= times["max"]


# --- Operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("model.rgb_encoder.frozen=false", "model.depth_branch.trained=all"),
        ("model.rgb_encoder.frozen=true", "model.depth_branch.trained=none"),
        ("model.depth_branch.trained=dpt",),
        ("model.depth_branch.trained=released",),
    ],
)
def test_encoders_take_what_the_counter_counts(options: tuple[str, ...]) -> None:
    model = on_meta(load_config(TINY, [*SMALLEST, *options]))
    images = torch.zeros(3, 3, 112, 112)
    rgb = flops_of_vit(model.rgb_encoder, 3)
    depth = flops_of_depth_branch(model.depth_branch, 112, 3)
    for formula, encoder in ((rgb, model.rgb_encoder), (depth, model.depth_branch)):
        counted = flops_by_counter(encoder, images)
        assert formula.forward == pytest.approx(counted.forward)
        assert formula.backward == pytest.approx(counted.backward)
    assert (depth.backward == 0) == ("model.depth_branch.trained=none" in options)


@pytest.mark.parametrize(
    ("rank", "skips_prefix"), [(0, False), (4, False), (4, True)], ids=["full", "lora", "skips"]
)
def test_the_language_model_takes_what_the_counter_counts_without_the_mask(
    rank: int,
    skips_prefix: bool,
    make_parts: Callable[..., tuple],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the counter sees
    monkeypatch.setattr(CausalLM, "skips_prefix", skips_prefix)
    model, tokenizer, _ = make_parts(f"model.language_model.lora.rank={rank}")
    language_model = model.language_model.train()
    branches = nominal_branches(2, 3)
    text = random_batch(branches, 112, model.num_image_tokens, 4, tokenizer.vocab_size).text
    width = language_model.hidden_size
    embeddings = torch.randn(*text.segment_ids.shape, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = language_model(embeddings, text).flatten(0, 1)
        logits = language_model.logits(hidden[text.label_positions])
        forward = counter.get_total_flops()
        logits.sum().backward()
    total = counter.get_total_flops()

    # Pairs of tokens that the mask hides, which the counter counts as well
    num_rows, num_columns = text.segment_ids.shape
    num_blocks = len(language_model.base.model.layers)
    first = text.prefix_length if skips_prefix else 0
    hidden_pairs = (num_blocks - 1) * (num_rows * num_columns**2 - num_attended_pairs(text))
    hidden_pairs += num_rows * (num_columns - first) * num_columns
    hidden_pairs -= num_attended_pairs(text, first)
    masked = 4 * hidden_pairs * width

    # Angles of the positions are a product too
    formula = flops_of_language_model(language_model, text, num_logits=len(text.label_positions))
    assert forward == pytest.approx(formula.forward + masked, rel=2e-3)
    assert total == pytest.approx(formula.total + 3 * masked, rel=2e-3)
    assert (formula.backward == 2 * formula.forward) == (rank == 0)


def test_pairs_are_those_of_the_mask() -> None:
    text = random_batch([[(3, 2), (4, 1)], [(2, 2)]], 14, 5, 4, 100).text
    mask = packed_attention_mask(text.reach)[:, 0]
    assert num_attended_pairs(text) == int(mask[text.segment_ids >= 0].sum())


@pytest.mark.parametrize(
    ("num_queries", "num_tokens", "per_query"), [(1, 430, 14.0), (8, 963, 3.5)]
)
def test_full_size_takes_14_tflop_a_sample(
    num_queries: int, num_tokens: int, per_query: float
) -> None:
    model = on_meta(load_config(FULL, ["model.depth_branch.trained=none"]))
    branches = even_branches(1, num_queries, num_tokens - 4 - model.num_image_tokens)
    batch = random_batch(branches, 448, model.num_image_tokens, 4, 32000)
    flops = flops_of_batch(model, batch)
    tflop = {part: flops_of_part.total / 1e12 for part, flops_of_part in flops.items()}
    assert set(tflop) == {*PARTS, "projector"}
    assert tflop["rgb_encoder"] == pytest.approx(2.25, rel=0.005)
    assert tflop["depth_branch"] == pytest.approx(0.27, rel=0.01)
    if num_queries == 1:
        assert tflop["language_model"] == pytest.approx(11.2, rel=0.005)
    assert 0 < tflop["pixel_decoder"] < 0.1
    assert sum(tflop.values()) / num_queries == pytest.approx(per_query, rel=0.02)


def test_rounded_up_tokens_take_nothing() -> None:
    model = on_meta(load_config(TINY, list(SMALLEST)))
    flops = []
    for multiple in (1, PAD_TO_MULTIPLE_OF):
        batch = random_batch(
            nominal_branches(2, 3),
            112,
            model.num_image_tokens,
            4,
            1024,
            pad_to_multiple_of=multiple,
        )
        assert batch.text.segment_ids.shape[1] % multiple == 0
        assert batch.used_slots.shape[1] % multiple == 0
        flops.append(flops_of_batch(model, batch)["language_model"])
    assert flops[0] == flops[1]


# --- Time -----------------------------------------------------------------------------------------


def test_time_is_put_down_to_what_was_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("annexe.benchmarks.timing.time.perf_counter", lambda: next(moments))
    timeline = Timeline(torch.device("cpu"))
    for section in ("read", "think", "read", "think", "end"):
        timeline.enter(section)
    assert timeline.sections() == {"read": 8.0, "think": 3.0}
    assert timeline.laps("read") == [3.0, 8.0]
    assert time_by_section(timeline, 2)["read"] == {"ms": 4000.0, "share": 8 / 11}


def test_a_timed_method_enters_sections_and_is_restored() -> None:
    class Doubler:
        def double(self, value: int) -> int:
            return 2 * value

    doubler = Doubler()
    timeline = Timeline(torch.device("cpu"))
    results: list[int] = []
    timed = timeline.timing_method(
        doubler, "double", during="doubling", after="rest", on_result=results.append
    )
    with timed:
        assert doubler.double(3) == 6
    assert doubler.double(4) == 8
    assert [section for section, _ in timeline.marks] == ["doubling", "rest"]
    assert results == [6]


def test_the_ceiling_is_above_what_a_product_in_a_loop_reaches() -> None:
    assert 0 < ceiling(torch.device("cpu")) < 1000


def test_percentiles_of_steps_grow() -> None:
    times = percentiles([0.001 * step for step in range(1, 101)])
    assert times["p50"] == pytest.approx(50.5)
    assert (times["min"], times["max"]) == (1.0, 100.0)
    ordered = [times[key] for key in ("min", "p50", "p90", "p99", "max")]
    assert all(lower <= higher for lower, higher in pairwise(ordered))


# --- Training -------------------------------------------------------------------------------------


def test_training_is_measured_without_data_and_beside_another(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ("--steps", 3, "--warmup", 1, "--queries", 2, "--tokens", 200)
    report = bench("train", *counts, "--against", "run.batch_size=1")
    assert report["what"] == "train"
    assert report["against_options"] == ["run.batch_size=1"]
    for name, num_images in (("measured", 2), ("against", 1)):
        record = report[name]
        assert_units_agree(record, num_images)
        assert_flops_add_up(record)
        assert_adds_up(record["parts_of_step"])
        assert record["peak_memory_gb"]["resident"] > 0.1
        assert record["seconds_to_first_step"] == pytest.approx(
            sum(record["start_seconds"].values())
        )
        seen = {f"{part}, forward" for part in (*PARTS, "projector")}
        seen |= {"language_model, backward", "rest of backward", "losses", "clipping and optimizer"}
        timed = {part for part, section in record["parts_of_step"].items() if section["ms"] > 0}
        assert seen <= timed

    # The second configuration beside the first
    flops = [report[name]["tflop_per_image"]["all"] for name in ("measured", "against")]
    assert flops[0] == pytest.approx(flops[1])
    assert report["ratio"]["images_per_step"] == 2
    ratio = report["measured"]["images_per_second"] / report["against"]["images_per_second"]
    assert report["ratio"]["images_per_second"] == pytest.approx(ratio)
    assert "weights are random" in report["notes"]
    assert "parts of step" in capsys.readouterr().out

    # Two processes beside one
    rate = report["measured"]["images_per_second"]
    two = report["measured"] | {"processes": 2, "images_per_second_per_process": 0.9 * rate}
    with pytest.raises(UserError, match="images per step of 2 process"):
        beside(two, [report])
    columns = beside(two | {"images_per_step": 4}, [report])
    assert {name: record["efficiency"] for name, record in columns.items()} == {
        "1 process": 1,
        "2 processes": pytest.approx(0.9),
    }
    assert read_earlier([], report) == []


def assert_units_agree(record: dict[str, Any], num_images: int) -> None:
    """Of two queries and 200 tokens an image."""
    units = (record["images_per_step"], record["queries_per_image"], record["tokens_per_image"])
    assert units == pytest.approx((num_images, 2, 200))
    images_per_second = record["images_per_second"]
    assert record["queries_per_second"] == pytest.approx(2 * images_per_second)
    assert record["tokens_per_second"] == pytest.approx(200 * images_per_second)
    step_ms = record["step_ms"]
    assert_ordered(step_ms)
    assert num_images * 1000 / step_ms["max"] <= images_per_second
    assert images_per_second <= num_images * 1000 / step_ms["min"]


def assert_flops_add_up(record: dict[str, Any]) -> None:
    flop = record["tflop_per_image"]
    assert set(flop) == {*PARTS, "projector", "all"}
    for part in flop.values():
        assert part["forward"] + part["backward"] == pytest.approx(part["total"])
    assert sum(part["total"] for part in flop.values()) == pytest.approx(2 * flop["all"]["total"])
    tflop_per_second = record["tflop_per_second"]
    assert tflop_per_second == pytest.approx(flop["all"]["total"] * record["images_per_second"])
    share = tflop_per_second / record["ceiling_tflop_per_second"]
    assert record["share_of_ceiling"] == pytest.approx(share)


def test_training_on_its_own_data_goes_on_with_other_photos(
    bench: Bench, scenes: Path, decoded: list[str]
) -> None:
    options = (
        f"datasets.ego_irgbench.data_root={scenes}",
        "datasets.ego_irgbench.queries_per_image=5",
        "run.gradient_accumulation=2",
        "run.batch_size=1",
    )
    report = bench("train", "--real", "--steps", 2, "--warmup", 1, options=options)
    record = report["measured"]
    assert record["images_per_step"] == 2
    assert record["queries_per_image"] == 5
    assert record["parts_of_step"]["waiting for data"]["ms"] > 0
    assert 0 < record["share_of_waiting_for_data"] < 1
    assert record["share_of_padding"] == 0  # a row by itself has none
    tokens_per_second = record["tokens_per_image"] * record["images_per_second_from_memory"]
    assert record["tokens_per_second_from_memory"] == pytest.approx(tokens_per_second)
    assert "photos are decoded" in report["notes"][0]
    # 1 + 1 + 2 steps, and 1 + 2 for the parts: more than there are
    assert len(decoded) == len(set(decoded)) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_are_measured_and_parts_are_timed_without_them(bench: Bench) -> None:
    options = (NO_DATA, "run.device=cuda", "run.cuda_graphs=true")
    report = bench("train", "--steps", 3, "--warmup", 3, options=options)
    assert any("without CUDA graphs" in note for note in report["notes"])
    memory = report["measured"]["peak_memory_gb"]
    assert 0 < memory["allocated"] <= memory["reserved"]
    assert_adds_up(report["measured"]["parts_of_step"])


def test_stored_patches_leave_the_encoder_out(bench: Bench) -> None:
    options = (NO_DATA, "model.rgb_encoder.frozen=true")
    report = bench("train", "--stored", "--steps", 2, "--warmup", 0, options=options)
    flop = report["measured"]["tflop_per_image"]
    assert flop["rgb_encoder"]["total"] == 0
    assert flop["all"]["total"] > 0
    assert "rgb_encoder, forward" not in report["measured"]["parts_of_step"]


# --- Rewards --------------------------------------------------------------------------------------


def test_rewards_are_measured_without_data(bench: Bench) -> None:
    """Of two photos with three prompts each, and groups of two."""
    options = (NO_DATA, "run.rewards.group_size=2", "run.max_new_tokens=5")
    counts = ("--steps", 2, "--warmup", 1, "--queries", 2)
    record = bench("rewards", *counts, options=options)["measured"]
    assert record["completions_per_step"] == 2 * 3 * 2
    assert 0 < record["tokens_per_completion"] <= 5
    per_photo = record["completions_per_second"] / record["images_per_second"]
    assert per_photo == pytest.approx(3 * 2)
    assert_ordered(record["step_ms"])
    assert_adds_up(record["parts_of_step"])
    timed = {part for part, section in record["parts_of_step"].items() if section["ms"] > 0}
    assert {"drawing", "scoring", "divergence from the start", "trained pass"} < timed
    assert record["tflop_per_image"]["all"]["total"] > 0


# --- Generation -----------------------------------------------------------------------------------


def test_every_response_has_its_full_length(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    encode = mask_postprocessing.encode
    monkeypatch.setattr(
        mask_postprocessing, "encode", lambda mask: shapes.add(mask.shape) or encode(mask)
    )
    monkeypatch.setattr(DraftingStep, "run", None)  # which would know the batch after the warm-up
    options = (NO_DATA, "model.presence_threshold=0", "run.num_workers=1")
    counts = ("--queries", 2, "--batch-size", 3, "--new-tokens", 7, "--batches", 2)
    report = bench("generate", *counts, "--height", 90, "--width", 160, options=options)
    record = report["measured"]
    assert record["tokens_per_response"] == record["steps_per_batch"] == 7
    assert shapes == {(90, 160)}
    assert 0 < record["masks_per_query"] <= 4
    assert record["answers_per_second"] == pytest.approx(2 * record["images_per_second"])
    assert_ordered(record["batch_ms"])
    assert_adds_up(record["parts_of_batch"])
    named = {"encoders", "prefill", "pixel_decoder", "decoding"}
    assert named | {"waiting for masks and run lengths"} <= set(record["parts_of_batch"])


def test_drafts_of_answers_to_the_same_photos_save_steps(bench: Bench) -> None:
    counts = ("--batch-size", 1, "--new-tokens", 12, "--batches", 1, "--height", 9, "--width", 16)
    report = bench("generate", "--drafts", *counts, options=(NO_DATA, "run.num_workers=0"))
    assert report["measured"]["tokens_per_response"] == 12
    assert report["measured"]["steps_per_batch"] < 12
    assert any("drafts are learned" in note for note in report["notes"])


def test_an_evaluation_is_timed_from_files_to_scores(
    bench: Bench, scenes: Path, decoded: list[str]
) -> None:
    options = (
        f"datasets.ego_irgbench.data_root={scenes}",
        "run.batch_size=1",
        "run.max_new_tokens=3",
        "run.num_workers=0",
        "run.report=false",
    )
    report = bench("evaluate", options=options)
    record = report["measured"]
    num_images = record["images"]
    assert len(decoded) == 2 * num_images  # once for the evaluation, once for what is in memory
    assert record["photos_after_start_up"] == num_images - 1 > 0
    assert sum(record["share_of_time"].values()) == pytest.approx(1)
    rate = record["photos_per_second"]
    assert rate == pytest.approx((num_images - 1) / record["seconds_after_start_up"])
    alone = record["photos_per_second_of_generation_alone"]
    assert record["share_of_generation_alone"] == pytest.approx(rate / alone)


def test_no_state_ends_a_response(make_parts: Callable[..., tuple]) -> None:
    language_model = make_parts()[0].language_model
    states = torch.randn(500, language_model.hidden_size)
    eos_id = language_model.tokenizer.eos_id
    with torch.no_grad():
        language_model.base.lm_head.weight[eos_id] *= 1000
        ends = language_model.logits(states).argmax(-1) == eos_id
        assert ends.float().mean() > 0.3
        never_end(language_model)
        assert not (language_model.logits(states).argmax(-1) == eos_id).any()


# --- Loading and scoring --------------------------------------------------------------------------


def test_the_loader_is_timed_with_an_empty_and_a_filled_cache(
    bench: Bench, scenes: Path, decoded: list[str]
) -> None:
    options = (f"datasets.ego_irgbench.data_root={scenes}",)
    report = bench("data", "--images", 8, "--workers", 0, 1, options=options)
    assert list(report["measured"]) == ["0", "1"]
    assert len(decoded) == 8  # in this process, and for the cold cache alone
    for num_workers, record in report["measured"].items():
        assert record["images"] == 8
        for state in ("cold", "warm"):
            timed = record[state]
            ms = 1000 / timed["images_per_second"]
            assert timed["ms_per_image_and_core"] == pytest.approx(ms)
            assert timed["seconds_to_first_batch"] > 0
            assert (timed["memory_per_worker_gb"] is None) == (num_workers == "0")
            assert num_workers == "0" or 0.01 < timed["memory_per_worker_gb"] < 5


def test_scoring_is_timed_on_all_predictions(bench: Bench) -> None:
    record = bench("metrics", "--queries", 70, "--workers", 1)["measured"]
    assert record["queries"] == 70
    assert record["images"] == 1
    assert record["queries_per_second"] == pytest.approx(70 / record["seconds"])
    assert record["peak_memory_gb"]["all processes"] > 0.1


def test_random_predictions_are_of_the_schema_and_complete(scenes: Path, tmp_path: Path) -> None:
    truth = Truth(EgoIRGBench("val", 1, 0, None, data_root=str(scenes), cache=False))
    records = list(random_predictions(truth))
    write_records(tmp_path / "predictions.jsonl", records)
    read = read_predictions(tmp_path / "predictions.jsonl", truth)
    require_complete(read, truth)  # raises where an annotation is not asked
    assert read == records
    num_queries = sum(isinstance(record, QueryRecord) for record in read)
    assert 0 < num_queries < len(read)


def test_a_scratch_folder_goes_away_and_leaves_the_cache_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANNEXE_CACHE", "mine")
    with scratch_folder(with_index_cache=True) as folder:
        assert os.environ["ANNEXE_CACHE"].startswith(str(folder))
        generate(
            folder / "data", num_images=1, seed=0, val_fraction=0, test_fraction=0, num_workers=1
        )
    assert not folder.exists()
    assert os.environ["ANNEXE_CACHE"] == "mine"


# --- Wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "arguments", "message"),
    [
        ("train", ("--steps", 0), "--steps 0 must be at least 1"),
        ("train", ("--tokens", 12), "give at least"),
        ("train", ("--real", "--queries", 2), "leave it out, or --real"),
        ("train", ("--real",), "no/such/folder"),
        ("train", ("--against", "run.batchsize=2"), "batch_size"),
        ("train", ("--against", "run.batch_size"), "not of the form"),
        ("train", ("--beside", "one.json"), "there is no file 'one.json'"),
        ("train", ("--beside", TINY), "annexe_tiny.yaml' is damaged"),
        ("train", ("--beside", "one.json", "--against", "run.seed=1"), "leave --against out"),
        ("generate", ("--new-tokens", -1), "must be at least 1"),
        ("data", ("--workers", 1, -2), "--workers -2 must be at least 0"),
        ("data", (), "no/such/folder"),
        ("metrics", ("--workers", 0), "--workers 0 must be at least 1"),
    ],
)
def test_wrong_input_ends_in_one_line(
    action: str,
    arguments: tuple,
    message: str,
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(action, *arguments)
    assert message in capsys.readouterr().err


def command_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> str:
    """What `annexe bench` prints to standard error when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["annexe", "bench", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


@pytest.mark.parametrize("action", ["train", "generate", "data"])
def test_a_configuration_without_a_model_is_refused(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "eval_configs" / "annexe_tiny.yaml"
    error = command_error(monkeypatch, capsys, action, "--cfg-path", path)
    assert "has no model block" in error


def test_json_that_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    json_path = tmp_path / "file" / "bench.json"
    error = command_error(monkeypatch, capsys, "metrics", "--json", json_path)
    assert "name another file" in error
