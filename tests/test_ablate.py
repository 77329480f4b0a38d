"""`annexe ablate`: real tiny runs, what is done again and what is not, failures, interrupts, wrong files, the table."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import yaml

from annexe import cli
from annexe.ablation.rows import METRICS, read_ablation, runs_of
from annexe.build import build_component, load_config
from annexe.config import as_dict
from annexe.tools import ablate
from annexe.tools.ablate import EVALUATE, TRAIN
from annexe.trainer import Trainer
from tests.conftest import ROOT, SMALLEST, TINY

EVALUATION = ROOT / "eval_configs" / "annexe_tiny.yaml"
GROUNDING = ROOT / "train_configs" / "grounding_ablation.yaml"


@pytest.fixture
def annexe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs `annexe ablate` in this process, at the top of the repository; gives exit code, output and errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def run(*words: object) -> tuple[int | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["annexe", "ablate", *map(str, words)])
        code = None
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(tmp_path: Path, scenes: Path) -> Callable[..., Path]:
    """Writes a file of rows: two that train, one that evaluates the first of them anew; ``changes`` stand over it."""
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
        path.write_text(
            yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None})
        )
        return path

    return write


class InThisProcess:
    """In place of `subprocess.Popen`: runs a script with its command line, without a new interpreter."""

    def __init__(self, command: list[str], stdout: TextIO, **_: object) -> None:
        sys.argv, self.code = command[1:], 0
        try:
            runpy.run_path(command[1], run_name="__main__")
        except RuntimeError as error:
            self.code = stdout.write(str(error))

    def wait(self) -> int:
        return self.code


def test_rows_and_seeds_are_trained_evaluated_and_continued(annexe, rows, tmp_path, monkeypatch):
    out, file = tmp_path / "out", rows()
    streams = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(Popen=InThisProcess, **streams))
    monkeypatch.setattr(
        "annexe.evaluator.write_report", lambda *_, **__: None
    )  # takes the most time
    code, printed, errors = annexe(
        file, "--out", out, "--rows", "refusing"
    )  # its base is trained along
    assert code is None, printed + errors
    assert (
        "1 of 1: refusing, seed 0 is finished" in printed
        and not (out / "default/seed-0/eval").exists()
    )
    assert (
        (out / "default/seed-0/output.txt").read_text().startswith("$ python train.py --cfg-path")
    )
    assert [path.name.partition("-")[0] for path in (out / "cache").iterdir()] == ["pixels"]
    first_log = (out / "default/seed-0/log.jsonl").read_text()
    save, ended = Trainer.save, []

    def save_and_die(trainer: Trainer) -> None:
        save(trainer)
        if trainer.output.parent.name == "one-layer" and trainer.run.seed == 1 and not ended:
            ended.append(trainer)
            raise RuntimeError("lightning struck")

    monkeypatch.setattr(Trainer, "save", save_and_die)
    code, printed, _ = annexe(file, "--out", out, "--seeds", 0, 1)
    assert code == 1 and "1 of 6 runs are finished already" in printed
    assert (
        "one-layer, seed 1 FAILED" in printed
        and "lightning struck" in printed
        and "refusing, seed 1 is" in printed
    )
    record = json.loads((out / "table.json").read_text())
    assert [row["seeds"] for row in record["rows"].values()] == [[0, 1], [0], [0, 1]]
    assert (out / "default/seed-0/log.jsonl").read_text() == first_log  # not trained again

    lines = (out / "one-layer/seed-1/log.jsonl").read_text().splitlines()
    code, printed, _ = annexe(file, "--out", out, "--seeds", 1, "--rows", "one-layer")
    assert code is None and "1 of 1: one-layer, seed 1 is finished" in printed
    after = (out / "one-layer/seed-1/log.jsonl").read_text().splitlines()
    assert (
        len(lines) == 1 and len(after) == 2 and after[0] == lines[0]
    )  # it went on behind its first step
    check_table(out)
    check_refusals(annexe, rows, out)


def check_table(out: Path) -> None:
    """The whole table, also after a call for one row: means, spreads, times, commands."""
    record, page = json.loads((out / "table.json").read_text()), (out / "table.md").read_text()
    assert list(record["rows"]) == ["default", "one-layer", "refusing"]
    for name, row in record["rows"].items():
        assert row["seeds"] == [0, 1] and row["steps"] == 2 and row["evaluated_steps"] == [2, 2]
        assert 0 < row["minutes"] < 5 and row["gpu_memory"] is None
        scores = [
            json.loads((out / name / f"seed-{s}" / "eval/metrics.json").read_text()) for s in (0, 1)
        ]
        first, second = (own["subsets"]["unseen_pairs"]["grounding/ciou"] for own in scores)
        expected = {
            "mean": (first + second) / 2,
            "spread": abs(first - second) / 2,
            "values": [first, second],
        }
        assert row["metrics"]["unseen_pairs:grounding/ciou"] == expected
        assert row["metrics"]["grounding/ciou"]["values"] == [
            own["standard"]["grounding/ciou"] for own in scores
        ]
        assert {
            key for key in scores[0]["standard"] if "num_" not in key and "/miou/" not in key
        } <= METRICS
        assert f"# {name}: {row['note']}\n{row['train']}\n{row['evaluate']}\n" in page
    assert (
        "| row | grounding/ciou | grounding/n_acc | unseen_pairs:grounding/ciou | seeds | minutes | GB |"
        in page
    )
    assert "| refusing | 0.000 ± 0.000 | 1.000 ± 0.000 |" in page


def check_refusals(annexe: Callable, rows: Callable[..., Path], out: Path) -> None:
    """Finished runs are not mixed with those of other settings, be they options or lines of the recipe."""
    code, _, errors = annexe(
        rows(rows={"default": {"options": ["run.learning_rate=5e-4"]}}), "--out", out
    )
    assert (
        code == 2 and "differ in run.learning_rate=5e-4;" in errors and "default/seed-0'" in errors
    )
    code, _, errors = annexe(rows(), "--out", out, "--evaluation-options", "run.max_new_tokens=5")
    assert code == 2 and "differ in run.max_new_tokens=5;" in errors and "seed-0/eval'" in errors
    code, printed, _ = annexe(
        rows(), "--out", out, "--evaluation-options", "run.num_workers=1", "--seeds", 1
    )
    assert code is None and "3 of 3 runs are finished already" in printed
    saved = out / "one-layer" / "seed-0" / "ablation.json"
    saved.write_text(saved.read_text().replace("warmup_steps: ", "warmup_steps: 1"))
    code, _, errors = annexe(rows(), "--out", out)
    assert code == 2 and "differ in warmup_steps: " in errors and "one-layer/seed-0'" in errors


STAND_IN = """
import json, os, pathlib, sys, time
given = dict(option.split("=", 1) for option in sys.argv[sys.argv.index("--options") + 1 :])
out = pathlib.Path(given["run.output_dir"])
(out / "device.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
(out / "pid.txt").write_text(str(os.getpid()))
if given.get("model.patches_per_token") == "2":
    sys.exit("merge 2 is broken")
began = time.monotonic()
time.sleep(float(given.get("run.learning_rate", 0)))
(out / "times.txt").write_text(f"{began} {time.monotonic()}")
if "eval_scripts" in sys.argv[0]:
    (out / "metrics.json").write_text(json.dumps({"standard": {}, "subsets": {}, "meta": {"step": 2}}))
"""


@pytest.fixture
def stand_ins(annexe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A top folder whose scripts only pretend; they are quick to start."""
    (tmp_path / "top" / "eval_scripts").mkdir(parents=True)
    for script in (TRAIN, EVALUATE):
        (tmp_path / "top" / script).write_text(STAND_IN)
    monkeypatch.chdir(tmp_path / "top")


def with_merge(*values: int, seconds: float) -> dict[str, dict[str, list[str]]]:
    return {
        f"merge-{m}": {"options": [f"model.patches_per_token={m}", f"run.learning_rate={seconds}"]}
        for m in values
    }


@pytest.mark.usefixtures("stand_ins")
def test_runs_spread_over_gpus_and_failures_stop_no_other(annexe, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    file, out = rows(rows=with_merge(1, 2, 3, 4, seconds=1)), tmp_path / "out"
    code, printed, _ = annexe(
        file, "--out", out, "--seeds", 0, 1, "--gpus", 0, 2, "--jobs-per-gpu", 2
    )
    times = [tuple(map(float, path.read_text().split())) for path in out.glob("*/seed-?/times.txt")]
    at_once = [sum(began <= moment < ended for began, ended in times) for moment, _ in times]
    assert code == 1 and len(times) == 6 and 2 <= max(at_once) <= 4
    assert printed.count("merge 2 is broken") == 2 and printed.count("is finished: ") == 6
    (failed,) = (line for line in printed.splitlines() if line.startswith("failed: "))
    assert "merge-2, seed 0" in failed and "merge-2, seed 1" in failed and "merge-1" not in failed
    assert {path.read_text() for path in out.glob("*/seed-?/device.txt")} == {"5", "7"}
    assert "| merge-1 | – | – | – | 2 | – | – |" in (out / "table.md").read_text()


@pytest.mark.usefixtures("stand_ins")
def test_an_interrupt_ends_the_children_and_the_same_command_goes_on(
    annexe, rows, tmp_path, request
):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    file, out = rows(rows=with_merge(1, 3, seconds=60)), tmp_path / "out"
    pid = out / "merge-1" / "seed-0" / "pid.txt"

    def stop() -> None:
        while not (pid.is_file() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    code, printed, _ = annexe(file, "--out", out)
    assert code == 130 and "the same command goes on" in printed and "FAILED" not in printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (out / "merge-3").exists()
    (tmp_path / "top" / TRAIN).write_text("")
    code, printed, _ = annexe(file, "--out", out)
    assert code is None and "2 of 2: merge-3, seed 0 is finished" in printed


def test_a_dry_run_prints_commands_and_makes_nothing(annexe, rows, tmp_path):
    given = (rows(), "--out", tmp_path / "out", "--seeds", 0, 1, "--dry-run")
    code, printed, _ = annexe(*given, "--options", "run.max_steps=7")
    lines = printed.splitlines()
    assert code is None and len(lines) == 4 + 6 and not (tmp_path / "out").exists()
    assert {line.partition(" --")[0] for line in lines} == {
        f"python {name}" for name in (TRAIN, EVALUATE)
    }
    trainings = [line for line in lines if line.startswith("python train.py")]
    assert all("run.max_steps=7" in line and "run.resume=auto" in line for line in trainings)
    assert ["run.seed=0" in line for line in trainings] == [True, True, False, False]


def test_settings_that_only_other_rows_refuse_are_taken(annexe, rows, tmp_path):
    both = {"default": None, "deconv": {"options": ["model.pixel_decoder={type: deconv}"]}}
    setting = "model.pixel_decoder.mask_scale=4"
    given = (
        rows(rows=both, options=[]),
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--options",
        setting,
    )
    code, printed, _ = annexe(*given, "--rows", "default")
    assert code is None and len(printed.splitlines()) == 2
    code, _, errors = annexe(*given)
    assert (
        code == 2
        and "row 'deconv'" in errors
        and "'mask_scale'" in errors
        and len(errors.splitlines()) == 1
    )


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
        ({"options": [{"run.max_steps": 2}]}, ("{'run.max_steps': 2}", "a.b=c")),
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
    assert code == 2 and len(errors.splitlines()) == 1 and all(part in errors for part in parts), (
        errors
    )
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_end_in_one_line(annexe, rows, tmp_path, monkeypatch):
    given = (rows(), "--out", tmp_path / "out")
    for words, part in (
        ((tmp_path / "none.yaml", *given[1:]), "no file of rows"),
        ((*given, "--rows", "one_layer"), "Did you mean 'one-layer'"),
        ((*given, "--gpus", 0), "0 CUDA devices"),
        ((*given, "--seeds", 0, -1), "--seeds"),
        ((*given, "--options", "model.pixel_decoder.num_rows=4"), "row 'default': unknown setting"),
        (
            (*given, "--options", "datasets.ego_irgbench.data_root=nowhere"),
            "no data root 'nowhere'",
        ),
    ):
        code, _, errors = annexe(*words)
        assert code == 2 and part in errors and len(errors.splitlines()) == 1, errors
    monkeypatch.chdir(tmp_path)
    code, _, errors = annexe(*given)
    assert code == 2 and "change to the top folder" in errors


def test_the_grounding_ablation_fits_the_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    ablation, seen = read_ablation(GROUNDING), []
    for name, row in ablation.rows.items():
        assert row.note and runs_of(ablation, Path("out"), name, [0])
        config = load_config(ablation.config, [*row.options, *row.evaluation_options])
        build_component("pixel_decoder", config.model["pixel_decoder"], 8, 8, 8, 16)
        assert as_dict(config) not in seen, (
            name
        )  # each differs from the default and from every other
        seen.append(as_dict(config))
