"""`annexe bench`: formulas against PyTorch's counter, and records that add up; never how fast a machine is."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from annexe.benchmarks.flops import (
    counted,
    flops_of_vit,
    num_pairs,
    of_depth,
    of_llama,
    work_of_batch,
)
from annexe.benchmarks.memory import without_files
from annexe.benchmarks.random_batch import even_branches, nominal_branches, random_batch
from annexe.benchmarks.random_model import never_end, scratch
from annexe.benchmarks.scoring_speed import random_predictions
from annexe.benchmarks.timing import Timeline, ceiling, in_sections, percentiles
from annexe.build import build_model, load_config
from annexe.cli import main
from annexe.config import PARTS, Config
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PixelReader
from annexe.evaluation.records import read_predictions, require_complete, write_records
from annexe.evaluation.truth import Truth
from annexe.models import annexe as whole
from annexe.models.annexe import Annexe
from annexe.models.language_model.attention import packed_attention_mask
from annexe.synthetic.generate import generate
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF
from tests.conftest import ROOT, SMALLEST, TINY

FULL = ROOT / "train_configs" / "annexe.yaml"
NO_DATA = "datasets.ego_irgbench.data_root=no/such/folder"


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Runs `annexe bench` with the smallest configuration and gives what it wrote; nothing else may be left on disk."""
    here, temporary = tmp_path / "here", tmp_path_factory.mktemp("t")  # short: sockets lie in it
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(here)

    def run(what: str, *arguments: object, options: tuple[str, ...] = (NO_DATA,)) -> dict[str, Any]:
        config = () if what == "metrics" else ("--cfg-path", TINY, "--options", *SMALLEST, *options)
        command = ["annexe", "bench", what, *config, *arguments, "--json", tmp_path / "bench.json"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main()
        left = [*temporary.iterdir(), *here.iterdir()]
        assert not [
            path for path in left if not path.name.startswith("annexe_nltk_data")
        ]  # goes with the process
        return json.loads((tmp_path / "bench.json").read_text())

    return run


def on_meta(config: Config) -> Annexe:
    config, tokenizer, _ = without_files(config)
    return build_model(config.model, tokenizer, torch.device("meta"), bf16=True)


def assert_adds_up(sections: dict[str, dict[str, float]]) -> None:
    """Parts of a step make up the step."""
    parts = [own for name, own in sections.items() if name != "all"]
    assert sum(own["ms"] for own in parts) == pytest.approx(sections["all"]["ms"])
    assert (
        sum(own["share"] for own in parts)
        == pytest.approx(sections["all"]["share"])
        == pytest.approx(1)
    )


def assert_ordered(times: dict[str, float]) -> None:
    assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"] <= times["max"]


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
    eva, depth = flops_of_vit(model.rgb_encoder, 3), of_depth(model.depth_branch, 112, 3)
    for formula, run in (
        (eva, counted(model.rgb_encoder, images)),
        (depth, counted(model.depth_branch, images)),
    ):
        assert formula.forward == pytest.approx(run.forward) and formula.backward == pytest.approx(
            run.backward
        )
    assert (depth.backward == 0) == ("model.depth_branch.trained=none" in options)


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "lora"])
def test_the_language_model_takes_what_the_counter_counts_but_for_what_the_mask_hides(
    rank: int, make_parts: Callable[..., tuple]
) -> None:
    model, tokenizer, _ = make_parts(f"model.language_model.lora.rank={rank}")
    language, num_layers = (
        model.language_model.train(),
        len(model.language_model.llama.model.layers),
    )
    text = random_batch(
        nominal_branches(2, 3), 112, model.num_image_tokens, 4, tokenizer.vocab_size
    ).text
    embeddings = torch.randn(*text.segment_ids.shape, language.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = language.logits(language(embeddings, text).flatten(0, 1)[text.label_positions])
        forward = counter.get_total_flops()
        logits.sum().backward()
    formula = of_llama(language, text, num_logits=len(text.label_positions))
    rows, columns = text.segment_ids.shape
    masked = (
        4 * (rows * columns**2 - num_pairs(text.segment_ids)) * language.hidden_size * num_layers
    )
    assert forward == pytest.approx(
        formula.forward + masked, rel=2e-3
    )  # angles of the positions are a product too
    assert counter.get_total_flops() == pytest.approx(formula.total + 3 * masked, rel=2e-3)
    assert (formula.backward == 2 * formula.forward) == (rank == 0)


def test_pairs_are_those_of_the_mask() -> None:
    batch = random_batch([[(3, 2), (4, 1)], [(2, 2)]], 14, 5, 4, 100)
    real = batch.text.segment_ids >= 0
    assert num_pairs(batch.text.segment_ids) == int(
        packed_attention_mask(batch.text.segment_ids)[:, 0][real].sum()
    )


@pytest.mark.parametrize(
    ("num_queries", "num_tokens", "per_query"), [(1, 430, 14.0), (8, 963, 3.5)]
)
def test_full_size_takes_14_tflop_a_sample(
    num_queries: int, num_tokens: int, per_query: float
) -> None:
    model = on_meta(load_config(FULL, ["model.depth_branch.trained=none"]))
    branches = even_branches(1, num_queries, num_tokens - 4 - model.num_image_tokens)
    works = work_of_batch(model, random_batch(branches, 448, model.num_image_tokens, 4, 32000))
    tflop = {part: work.total / 1e12 for part, work in works.items()}
    assert set(tflop) == {*PARTS, "projector"}
    assert tflop["rgb_encoder"] == pytest.approx(2.25, rel=0.005)
    assert tflop["depth_branch"] == pytest.approx(0.27, rel=0.01)
    if num_queries == 1:
        assert tflop["language_model"] == pytest.approx(11.4, rel=0.005)
    assert 0 < tflop["pixel_decoder"] < 0.1
    assert sum(tflop.values()) / num_queries == pytest.approx(per_query, rel=0.02)


def test_rounded_up_tokens_take_nothing() -> None:
    model = on_meta(load_config(TINY, list(SMALLEST)))
    works = []
    for pad_to_multiple_of in (1, PAD_TO_MULTIPLE_OF):
        batch = random_batch(
            nominal_branches(2, 3),
            112,
            model.num_image_tokens,
            4,
            1024,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        assert (
            batch.text.segment_ids.shape[1] % pad_to_multiple_of
            == batch.used_slots.shape[1] % pad_to_multiple_of
            == 0
        )
        works.append(work_of_batch(model, batch))
    assert works[0]["language_model"] == works[1]["language_model"]


def test_time_is_put_down_to_what_was_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("annexe.benchmarks.timing.time.perf_counter", lambda: next(moments))
    timeline = Timeline(torch.device("cpu"))
    for section in ("read", "think", "read", "think", "end"):
        timeline.enter(section)
    assert timeline.sections() == {"read": 8.0, "think": 3.0}
    assert timeline.laps("read") == [3.0, 8.0]
    assert in_sections(timeline, 2)["read"] == {"ms": 4000.0, "share": 8 / 11}


def test_the_ceiling_is_above_what_a_product_in_a_loop_reaches() -> None:
    assert 0 < ceiling(torch.device("cpu")) < 1000


def test_training_is_measured_without_data_and_beside_another(
    bench: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench(
        "train",
        "--steps",
        3,
        "--warmup",
        1,
        "--queries",
        2,
        "--tokens",
        200,
        "--against",
        "run.batch_size=1",
    )
    assert report["what"] == "train" and report["against_options"] == ["run.batch_size=1"]
    for record, images in ((report["measured"], 2), (report["against"], 1)):
        units = (record["images_per_step"], record["queries_per_image"], record["tokens_per_image"])
        assert units == pytest.approx((images, 2, 200))
        assert record["queries_per_second"] == pytest.approx(2 * record["images_per_second"])
        assert record["tokens_per_second"] == pytest.approx(200 * record["images_per_second"])
        assert_ordered(record["step_ms"])
        assert images * 1000 / record["step_ms"]["max"] <= record["images_per_second"]
        assert record["images_per_second"] <= images * 1000 / record["step_ms"]["min"]
        assert record["peak_memory_gb"]["resident"] > 0.1 and record["seconds_to_first_step"] > 0
        flop = record["tflop_per_image"]
        assert set(flop) == {*PARTS, "projector", "all"}
        assert all(
            own["forward"] + own["backward"] == pytest.approx(own["total"]) for own in flop.values()
        )
        assert sum(own["total"] for own in flop.values()) == pytest.approx(2 * flop["all"]["total"])
        assert record["tflop_per_second"] == pytest.approx(
            flop["all"]["total"] * record["images_per_second"]
        )
        assert record["share_of_ceiling"] == pytest.approx(
            record["tflop_per_second"] / record["ceiling_tflop_per_second"]
        )
        assert_adds_up(record["parts_of_step"])
        seen = {f"{part}, forward" for part in (*PARTS, "projector")}
        seen |= {"language_model, backward", "rest of backward", "losses", "clipping and optimizer"}
        assert seen <= {name for name, own in record["parts_of_step"].items() if own["ms"] > 0}
    flops = [report[name]["tflop_per_image"]["all"] for name in ("measured", "against")]
    assert flops[0] == pytest.approx(flops[1])
    assert report["ratio"]["images_per_step"] == 2
    ratio = report["measured"]["images_per_second"] / report["against"]["images_per_second"]
    assert report["ratio"]["images_per_second"] == pytest.approx(ratio)
    assert "weights are random" in report["notes"]
    assert "parts of step" in capsys.readouterr().out


def test_training_on_its_own_data_goes_on_with_other_photos(
    bench: Callable[..., dict], scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = PixelReader._decode
    monkeypatch.setattr(
        PixelReader, "_decode", lambda self, stem: decoded.append(stem) or decode(self, stem)
    )
    options = (
        f"datasets.ego_irgbench.data_root={scenes}",
        "run.gradient_accumulation=2",
        "run.batch_size=1",
    )
    report = bench("train", "--real", "--steps", 2, "--warmup", 1, options=options)
    record = report["measured"]
    assert record["images_per_step"] == 2 and record["queries_per_image"] == 5  # as the file says
    assert record["parts_of_step"]["waiting for data"]["ms"] > 0
    assert "photos are decoded" in report["notes"][0]
    assert (
        len(decoded) == len(set(decoded)) == 12
    )  # 1 + 1 + 2 steps, and 1 + 2 for the parts: more than there are


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_are_measured_and_parts_are_timed_without_them(bench: Callable[..., dict]) -> None:
    options = (NO_DATA, "run.device=cuda", "run.cuda_graphs=true")
    report = bench("train", "--steps", 3, "--warmup", 3, options=options)
    assert any("without CUDA graphs" in note for note in report["notes"])
    memory = report["measured"]["peak_memory_gb"]
    assert 0 < memory["allocated"] <= memory["reserved"]
    assert_adds_up(report["measured"]["parts_of_step"])


def test_stored_patches_leave_the_encoder_out(bench: Callable[..., dict]) -> None:
    frozen = (NO_DATA, "model.rgb_encoder.frozen=true")
    measured = bench("train", "--stored", "--steps", 2, "--warmup", 0, options=frozen)["measured"]
    assert (
        measured["tflop_per_image"]["rgb_encoder"]["total"]
        == 0
        < measured["tflop_per_image"]["all"]["total"]
    )
    assert "rgb_encoder, forward" not in measured["parts_of_step"]


def test_every_response_has_its_full_length(
    bench: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    encode = whole.encode
    monkeypatch.setattr(whole, "encode", lambda mask: shapes.add(mask.shape) or encode(mask))
    options = (NO_DATA, "model.presence_threshold=0", "run.num_workers=1")
    asked = (
        "--queries",
        2,
        "--batch-size",
        3,
        "--new-tokens",
        7,
        "--batches",
        2,
        "--height",
        90,
        "--width",
        160,
    )
    report = bench("generate", *asked, options=options)
    record = report["measured"]
    assert record["tokens_per_response"] == 7 and shapes == {(90, 160)}
    assert 0 < record["masks_per_query"] <= 4
    assert record["answers_per_second"] == pytest.approx(2 * record["images_per_second"])
    assert_ordered(record["batch_ms"])
    assert_adds_up(record["parts_of_batch"])
    named = {
        "encoders",
        "prefill",
        "pixel_decoder",
        "decoding",
        "waiting for masks and run lengths",
    }
    assert named <= set(record["parts_of_batch"])


def test_no_state_ends_a_response(make_parts: Callable[..., tuple]) -> None:
    language = make_parts()[0].language_model
    states, eos = torch.randn(500, language.hidden_size), language.tokenizer.eos_id
    with torch.no_grad():
        language.llama.lm_head.weight[eos] *= 1000
        assert (language.logits(states).argmax(-1) == eos).float().mean() > 0.3
        never_end(language)
        assert not (language.logits(states).argmax(-1) == eos).any()


def test_the_loader_is_timed_with_an_empty_and_a_filled_cache(
    bench: Callable[..., dict], scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = PixelReader._decode
    monkeypatch.setattr(
        PixelReader, "_decode", lambda self, stem: decoded.append(stem) or decode(self, stem)
    )
    options = (f"datasets.ego_irgbench.data_root={scenes}",)
    report = bench("data", "--images", 8, "--workers", 0, 1, options=options)
    assert list(report["measured"]) == ["0", "1"]
    assert len(decoded) == 8  # in this process, and for the cold cache alone
    for workers, record in report["measured"].items():
        assert record["images"] == 8
        for state in ("cold", "warm"):
            own = record[state]
            assert own["ms_per_image_and_core"] == pytest.approx(1000 / own["images_per_second"])
            assert own["seconds_to_first_batch"] > 0
            assert (own["memory_per_worker_gb"] is None) == (workers == "0")
            assert workers == "0" or 0.01 < own["memory_per_worker_gb"] < 5


def test_scoring_is_timed_on_predictions_that_are_whole(
    bench: Callable[..., dict], tmp_path: Path
) -> None:
    record = bench("metrics", "--queries", 70, "--workers", 1)["measured"]
    assert record["queries"] == 70 and record["images"] == 1
    assert record["queries_per_second"] == pytest.approx(70 / record["seconds"])
    assert record["peak_memory_gb"]["all processes"] > 0.1


def test_made_up_predictions_are_of_the_schema_and_complete(scenes: Path, tmp_path: Path) -> None:
    truth = Truth(EgoIRGBench("val", 1, 0, None, data_root=str(scenes), cache=False))
    made_up = list(random_predictions(truth))
    write_records(tmp_path / "predictions.jsonl", made_up)
    read = read_predictions(tmp_path / "predictions.jsonl", truth)
    require_complete(read, truth)  # raises where an annotation is not asked
    assert len(read) == len(made_up) and {record["kind"] for record in read} == {"image", "query"}


def test_scratch_goes_away_and_leaves_the_cache_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANNEXE_CACHE", "mine")
    with scratch(own_cache=True) as folder:
        assert os.environ["ANNEXE_CACHE"].startswith(str(folder))
        generate(
            folder / "data", num_images=1, seed=0, val_fraction=0, test_fraction=0, num_workers=1
        )
    assert not folder.exists() and os.environ["ANNEXE_CACHE"] == "mine"


@pytest.mark.parametrize(
    ("what", "arguments", "said"),
    [
        ("train", ("--steps", 0), "--steps 0 must be at least 1"),
        ("train", ("--tokens", 12), "give at least"),
        ("train", ("--real", "--queries", 2), "leave them out, or --real"),
        ("train", ("--real",), "no/such/folder"),
        ("train", ("--against", "run.batchsize=2"), "batch_size"),
        ("train", ("--against", "run.batch_size"), "not of the form"),
        ("generate", ("--new-tokens", -1), "must be at least 1"),
        ("data", ("--workers", 1, -2), "--workers -2 must be at least 0"),
        ("data", (), "no/such/folder"),
        ("metrics", ("--workers", 0), "--workers 0 must be at least 1"),
    ],
)
def test_wrong_input_ends_in_one_line(
    what: str,
    arguments: tuple,
    said: str,
    bench: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(what, *arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["train", "generate", "data"])
def test_a_configuration_without_a_model_is_refused(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["annexe", "bench", what, "--cfg-path", str(ROOT / "eval_configs/annexe_tiny.yaml")],
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "has no model block" in capsys.readouterr().err


def test_json_cannot_be_written_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        sys, "argv", ["annexe", "bench", "metrics", "--json", str(tmp_path / "file" / "bench.json")]
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "name another file" in capsys.readouterr().err


def test_percentiles_of_steps_grow() -> None:
    times = percentiles([0.001 * n for n in range(1, 101)])
    assert times["p50"] == pytest.approx(50.5) and (times["min"], times["max"]) == (1.0, 100.0)
    assert all(
        a <= b for a, b in pairwise(times[key] for key in ("min", "p50", "p90", "p99", "max"))
    )
