"""`annexe ablate`: tiny runs, what is run again and what is not, failures, wrong files, table."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import yaml

from annexe.ablation import queue
from annexe.ablation.rows import EVALUATE, METRICS, TRAIN, read_ablation, runs_of
from annexe.build import build_component, load_config
from annexe.config import as_dict
from annexe.trainer import Trainer
from tests.conftest import ROOT, SMALLEST, TINY

EVALUATION = ROOT / "eval_configs" / "annexe_tiny.yaml"
GROUNDING = ROOT / "train_configs" / "grounding_ablation.yaml"
ANSWERS = ROOT / "train_configs" / "answers_ablation.yaml"


@pytest.fixture
def annexe(monkeypatch: pytest.MonkeyPatch, command_line: Callable) -> Callable:
    """Runs `annexe ablate` in this process, at the top of the repository.

    Gives exit code, output and errors.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return partial(command_line, "ablate")


@pytest.fixture
def rows(tmp_path: Path, scenes: Path) -> Callable[..., Path]:
    """Writes a file of rows: two that train, and one that evaluates the first of them again.

    ``changes`` are put over it; None removes an entry.
    """
    short = ("run.max_steps=2", "run.warmup_steps=0", "run.checkpoint_every=1")
    content = {
        "config": str(TINY),
        "evaluate": str(EVALUATION),
        "metrics": ["grounding/ciou", "grounding/n_acc", "unseen_pairs:grounding/ciou"],
        "options": [*SMALLEST, f"datasets.ego_irgbench.data_root={scenes}", *short],
        "evaluation_options": ["run.device=cpu", "run.num_workers=0", "run.max_new_tokens=4"],
        "rows": {
            "default": None,
            "one-layer": {"note": "a layer less", "options": ["model.pixel_decoder.num_layers=1"]},
            "refusing": {
                "same_run_as": "default",
                "evaluation_options": ["model.presence_threshold=1"],
            },
        },
    }

    def write(**changes: object) -> Path:
        path = tmp_path / "rows.yaml"
        entries = {k: v for k, v in (content | changes).items() if v is not None}
        path.write_text(yaml.safe_dump(entries))
        return path

    return write


class InThisProcess:
    """In place of `subprocess.Popen`: runs a script with its command line in this process."""

    def __init__(self, command: list[str], stdout: TextIO, **_: object) -> None:
        sys.argv = command[1:]
        self.code = 0
        try:
            runpy.run_path(command[1], run_name="__main__")
        except RuntimeError as error:
            self.code = stdout.write(str(error))

    def wait(self) -> int:
        return self.code


def test_rows_and_seeds_are_trained_evaluated_and_continued(annexe, rows, tmp_path, monkeypatch):
    streams = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    children = SimpleNamespace(Popen=InThisProcess, **streams)
    monkeypatch.setattr(queue, "subprocess", children)
    # It takes most of the time
    monkeypatch.setattr("annexe.evaluator.write_report", lambda *_, **__: None)
    out = tmp_path / "out"
    file = rows()

    # A row that shares a training has it trained along
    code, printed, errors = annexe(file, "--out", out, "--rows", "refusing")
    assert code == 0, printed + errors
    assert "1 of 1: refusing, seed 0 is finished" in printed
    assert not (out / "default/seed-0/eval").exists()
    output = (out / "default/seed-0/output.txt").read_text()
    assert output.startswith("$ python train.py --cfg-path")
    assert [path.name.partition("-")[0] for path in (out / "cache").iterdir()] == ["pixels"]
    first_log = (out / "default/seed-0/log.jsonl").read_text()

    # A failure stops no other run, and what is finished is not trained again
    strike_once(monkeypatch)
    code, printed, _ = annexe(file, "--out", out, "--seeds", 0, 1)
    assert code == 1
    assert "1 of 6 runs are finished already" in printed
    assert "one-layer, seed 1 FAILED" in printed
    assert "lightning struck" in printed
    assert "refusing, seed 1 is" in printed
    record = json.loads((out / "table.json").read_text())
    assert [row["seeds"] for row in record["rows"].values()] == [[0, 1], [0], [0, 1]]
    assert (out / "default/seed-0/log.jsonl").read_text() == first_log

    # The failed run goes on behind its first step
    log = out / "one-layer/seed-1/log.jsonl"
    before = log.read_text().splitlines()
    code, printed, _ = annexe(file, "--out", out, "--seeds", 1, "--rows", "one-layer")
    assert code == 0
    assert "1 of 1: one-layer, seed 1 is finished" in printed
    after = log.read_text().splitlines()
    assert len(before) == 1
    assert len(after) == 2
    assert after[0] == before[0]
    check_table(out)
    check_refusals(annexe, rows, out)


def strike_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the training of row one-layer, seed 1, fail behind its first checkpoint, once."""
    save = Trainer.save
    struck = []

    def save_and_die(trainer: Trainer) -> None:
        save(trainer)
        is_row = trainer.output.parent.name == "one-layer"
        if is_row and trainer.run.seed == 1 and not struck:
            struck.append(trainer)
            raise RuntimeError("lightning struck")

    monkeypatch.setattr(Trainer, "save", save_and_die)


def check_table(out: Path) -> None:
    """The full table, also after a call for one row: means, spreads, times, commands."""
    record = json.loads((out / "table.json").read_text())
    page = (out / "table.md").read_text()
    assert list(record["rows"]) == ["default", "one-layer", "refusing"]
    for name, row in record["rows"].items():
        assert row["seeds"] == [0, 1]
        assert row["steps"] == 2
        assert row["evaluated_steps"] == [2, 2]
        assert 0 < row["minutes"] < 5
        assert row["gpu_memory"] is None
        assert f"# {name}: {row['note']}\n{row['train']}\n{row['evaluate']}\n" in page

        # Scores over both seeds
        scores = []
        for seed in (0, 1):
            path = out / name / f"seed-{seed}" / "eval" / "metrics.json"
            scores.append(json.loads(path.read_text()))
        first, second = (score["subsets"]["unseen_pairs"]["grounding/ciou"] for score in scores)
        assert row["metrics"]["unseen_pairs:grounding/ciou"] == {
            "mean": (first + second) / 2,
            "spread": abs(first - second) / 2,
            "values": [first, second],
        }
        standard = [score["standard"] for score in scores]
        values = [metrics["grounding/ciou"] for metrics in standard]
        assert row["metrics"]["grounding/ciou"]["values"] == values
        keys = {key for key in standard[0] if "num_" not in key and "/miou/" not in key}
        assert keys <= METRICS
    headers = "| row | grounding/ciou | grounding/n_acc | unseen_pairs:grounding/ciou |"
    assert f"{headers} seeds | minutes | GB |" in page
    assert "| refusing | 0.000 ± 0.000 | 1.000 ± 0.000 |" in page


def check_refusals(annexe: Callable, rows: Callable[..., Path], out: Path) -> None:
    """Finished runs are not mixed with those of other settings, be they options or recipe lines."""
    other_rate = {"default": {"options": ["run.learning_rate=5e-4"]}}
    code, _, errors = annexe(rows(rows=other_rate), "--out", out)
    assert code == 2
    assert "differ in run.learning_rate=5e-4;" in errors
    assert "default/seed-0'" in errors

    code, _, errors = annexe(rows(), "--out", out, "--evaluation-options", "run.max_new_tokens=5")
    assert code == 2
    assert "differ in run.max_new_tokens=5;" in errors
    assert "seed-0/eval'" in errors

    # Workers make no difference
    workers = ("--evaluation-options", "run.num_workers=1")
    code, printed, _ = annexe(rows(), "--out", out, *workers, "--seeds", 1)
    assert code == 0
    assert "3 of 3 runs are finished already" in printed

    saved = out / "one-layer" / "seed-0" / "ablation.json"
    saved.write_text(saved.read_text().replace("warmup_steps: ", "warmup_steps: 1"))
    code, _, errors = annexe(rows(), "--out", out)
    assert code == 2
    assert "differ in warmup_steps: " in errors
    assert "one-layer/seed-0'" in errors


STAND_IN = """
import json, os, pathlib, sys, time
options = dict(option.split("=", 1) for option in sys.argv[sys.argv.index("--options") + 1 :])
out = pathlib.Path(options["run.output_dir"])
(out / "device.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
(out / "pid.txt").write_text(str(os.getpid()))
if options.get("model.patches_per_token") == "2":
    sys.exit("two patches are broken")
began = time.monotonic()
time.sleep(float(options.get("run.learning_rate", 0)))
(out / "times.txt").write_text(f"{began} {time.monotonic()}")
if "eval_scripts" in sys.argv[0]:
    metrics = {"standard": {}, "subsets": {}, "meta": {"step": 2}}
    (out / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def stand_ins(annexe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A top folder whose scripts only pretend; they are quick to start."""
    (tmp_path / "top" / "eval_scripts").mkdir(parents=True)
    for script in (TRAIN, EVALUATE):
        (tmp_path / "top" / script).write_text(STAND_IN)
    monkeypatch.chdir(tmp_path / "top")


def rows_of_patches(*values: int, seconds: float) -> dict[str, dict[str, list[str]]]:
    """Rows ``patches-N``, each of which pretends to work for some seconds."""
    found = {}
    for value in values:
        options = [f"model.patches_per_token={value}", f"run.learning_rate={seconds}"]
        found[f"patches-{value}"] = {"options": options}
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_runs_spread_over_gpus_and_failures_stop_no_other(annexe, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    file = rows(rows=rows_of_patches(1, 2, 3, 4, seconds=1))
    out = tmp_path / "out"
    code, printed, _ = annexe(
        file, "--out", out, "--seeds", 0, 1, "--gpus", 0, 2, "--jobs-per-gpu", 2
    )
    assert code == 1

    # Two on each of two GPUs
    times = [tuple(map(float, path.read_text().split())) for path in out.glob("*/seed-?/times.txt")]
    num_at_once = []
    for moment, _ in times:
        num_at_once.append(sum(began <= moment < ended for began, ended in times))
    assert len(times) == 6
    assert 2 <= max(num_at_once) <= 4
    assert {path.read_text() for path in out.glob("*/seed-?/device.txt")} == {"5", "7"}

    # What failed is named
    assert printed.count("two patches are broken") == 2
    assert printed.count("is finished: ") == 6
    (failed,) = (line for line in printed.splitlines() if line.startswith("failed: "))
    assert "patches-2, seed 0" in failed
    assert "patches-2, seed 1" in failed
    assert "patches-1" not in failed
    assert "| patches-1 | – | – | – | 2 | – | – |" in (out / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_an_interrupt_ends_the_children_and_the_same_command_goes_on(
    annexe, rows, tmp_path, request
):
    # A shell's background job ignores interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    file = rows(rows=rows_of_patches(1, 3, seconds=60))
    out = tmp_path / "out"
    pid = out / "patches-1" / "seed-0" / "pid.txt"

    def interrupt() -> None:
        while not (pid.is_file() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, printed, _ = annexe(file, "--out", out)
    assert code == 130
    assert "the same command goes on" in printed
    assert "FAILED" not in printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (out / "patches-3").exists()

    (tmp_path / "top" / TRAIN).write_text("")
    code, printed, _ = annexe(file, "--out", out)
    assert code == 0
    assert "2 of 2: patches-3, seed 0 is finished" in printed


def test_a_dry_run_prints_commands_and_makes_nothing(annexe, rows, tmp_path):
    words = (rows(), "--out", tmp_path / "out", "--seeds", 0, 1, "--dry-run")
    code, printed, _ = annexe(*words, "--options", "run.max_steps=7")
    lines = printed.splitlines()
    assert code == 0
    assert len(lines) == 4 + 6
    assert not (tmp_path / "out").exists()
    scripts = {line.partition(" --")[0] for line in lines}
    assert scripts == {f"python {TRAIN}", f"python {EVALUATE}"}
    trainings = [line for line in lines if line.startswith("python train.py")]
    assert all("run.max_steps=7" in line and "run.resume=auto" in line for line in trainings)
    assert ["run.seed=0" in line for line in trainings] == [True, True, False, False]


def test_settings_that_only_other_rows_refuse_are_taken(annexe, rows, tmp_path):
    both = {"default": None, "deconv": {"options": ["model.pixel_decoder={type: deconv}"]}}
    words = (rows(rows=both, options=[]), "--out", tmp_path / "out", "--dry-run")
    words += ("--options", "model.pixel_decoder.masked_attention=true")
    code, printed, _ = annexe(*words, "--rows", "default")
    assert code == 0
    assert len(printed.splitlines()) == 2
    code, _, errors = annexe(*words)
    assert code == 2
    assert "row 'deconv'" in errors
    assert "'masked_attention'" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"evaluat": "x"}, ("evaluat", "Did you mean 'evaluate'")),
        ({"config": None}, ("config", "missing")),
        ({"metrics": ["grounding/cio"]}, ("grounding/cio", "Did you mean 'grounding/ciou'")),
        (
            {"metrics": ["unseen_pair:grounding/ciou"]},
            ("unseen_pair", "Did you mean 'unseen_pairs'"),
        ),
        ({"options": ["run.max_step=2"]}, ("Did you mean 'max_steps'",)),
        ({"options": [{"run.max_steps": 2}]}, ("options[0] is '{'run.max_steps': '2'}'", "a text")),
        ({"options": ["run.output_dir=x"]}, ("run.output_dir=x", "remove it")),
        ({"evaluation_options": ["run.batchsize=1"]}, ("Did you mean 'batch_size'",)),
        (
            {"evaluation_options": ["model.presence_treshold=1"]},
            ("Did you mean 'presence_threshold'",),
        ),
        ({"config": str(EVALUATION), "options": []}, ("of no training run",)),
        ({"rows": {}}, ("one entry",)),
        ({"rows": {"a": {"option": []}}}, ("rows.a.option", "Did you mean 'options'")),
        ({"rows": {"a/b": {}}}, ("'a/b'", "letters")),
        ({"rows": {"a": {"same_run_as": "b"}, "c": {}}}, ("'b'", "same_run_as of row 'a'")),
        (
            {"rows": {"a": {}, "b": {"same_run_as": "a"}, "c": {"same_run_as": "b"}}},
            ("'c'", "a row that trains"),
        ),
        (
            {"rows": {"a": {}, "b": {"same_run_as": "a", "options": ["run.seed=1"]}}},
            ("'b'", "evaluation_options"),
        ),
    ],
)
def test_wrong_files_end_in_one_line(changes, parts, annexe, rows, tmp_path):
    code, _, errors = annexe(rows(**changes), "--out", tmp_path / "out")
    assert code == 2, errors
    assert len(errors.splitlines()) == 1, errors
    assert all(part in errors for part in parts), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--rows", "one_layer"), "Did you mean 'one-layer'"),
        (("--gpus", 0), "0 CUDA devices"),
        (("--seeds", 0, -1), "--seeds"),
        (("--options", "model.pixel_decoder.num_rows=4"), "row 'default': unknown setting"),
        (
            ("--options", "datasets.ego_irgbench.data_root=nowhere"),
            "no data root 'nowhere'",
        ),
    ],
)
def test_wrong_arguments_end_in_one_line(words, part, annexe, rows, tmp_path):
    code, _, errors = annexe(rows(), "--out", tmp_path / "out", *words)
    assert code == 2, errors
    assert part in errors
    assert len(errors.splitlines()) == 1, errors


def test_files_that_are_not_there_are_named(annexe, rows, tmp_path, monkeypatch):
    code, _, errors = annexe(tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "no file of rows" in errors
    monkeypatch.chdir(tmp_path)
    code, _, errors = annexe(rows(), "--out", tmp_path / "out")
    assert code == 2
    assert "change to the top folder" in errors


@pytest.mark.parametrize("file", [GROUNDING, ANSWERS])
def test_an_ablation_fits_the_recipe(monkeypatch, file):
    """Every row has a note, and differs from the default and from every other."""
    monkeypatch.chdir(ROOT)
    ablation = read_ablation(file)
    seen = []
    for name, row in ablation.rows.items():
        assert row.note
        assert runs_of(ablation, Path("out"), name, [0])
        config = load_config(ablation.config, [*row.options, *row.evaluation_options])
        build_component("pixel_decoder", config.model["pixel_decoder"], 8, 8, 8, 16)
        assert as_dict(config) not in seen, name
        seen.append(as_dict(config))
