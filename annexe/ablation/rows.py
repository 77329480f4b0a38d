"""Rows of an ablation and the runs they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from annexe.build import load_config
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.config import merge_strictly, read_yaml
from annexe.errors import UserError, unknown_name_error
from annexe.report.tables import GROUPS, MEAN_ACCURACY

TRAIN = "train.py"
EVALUATE = "eval_scripts/eval_egoirgbench.py"
METRICS = {
    *(metric.key for group in GROUPS.values() for metric in group if metric.key != MEAN_ACCURACY),
    *(
        "consistency/contradictions",
        "calibration/confidence",
        "calibration/accuracy",
        "grounding/slot_ciou",
    ),
    *(f"grounding/slot_precision@0.{tenth}" for tenth in range(5, 10)),
    *(f"presence/risk@{coverage}" for coverage in (0.5, 0.7, 0.8, 0.9, 1.0)),
}
_OWN = ("run.output_dir", "run.seed", "run.resume", "run.checkpoint")
_FREE = (*_OWN, "run.num_workers")  # a run is the same whatever they are; its folder names its seed
_DATA = (
    "data_root",
    "answer_format",
    "exclude",
    "split_dir",
)  # an evaluation follows its training in these


@dataclass
class Row:
    """What a row changes; with ``same_run_as`` it evaluates the run of another row in another way."""

    note: str = ""
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)
    same_run_as: str | None = None


@dataclass
class Ablation:
    """A file of rows; a row's own options stand over these."""

    config: str = MISSING
    evaluate: str = MISSING
    metrics: list[str] = MISSING
    rows: dict[str, Row | None] = MISSING  # nothing behind a name: a row without changes
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A training or an evaluation: its command, and all options and lines of YAML files that it is made from."""

    folder: Path
    command: list[str]
    made_from: list[str]

    def require_unchanged(self) -> None:
        """Refuse to go on with, or to show, work that was made from other settings."""
        file = self.folder / "ablation.json"
        then = json.loads(file.read_text()) if file.is_file() else []
        holds_work = find_checkpoint(self.folder) or (self.folder / "metrics.json").is_file()
        if holds_work and then != self.made_from:
            differ = [
                part.strip()
                for part in (*self.made_from, *then)
                if (part in then) != (part in self.made_from)
            ]
            reason = (
                ", ".join(differ[:3]) or "their order" if then else f"all that '{file}' should hold"
            )
            raise UserError(
                f"'{self.folder}' was made from settings that differ in {reason}; take them back, remove this folder, "
                "or choose another --out"
            )


@dataclass(frozen=True)
class Run:
    """One row with one seed; rows with ``same_run_as`` share a training."""

    row: str
    seed: int
    training: Stage
    evaluation: Stage
    max_steps: int
    data_root: Path  # of the evaluation

    @property
    def metrics(self) -> Path:
        return self.evaluation.folder / "metrics.json"


def read_ablation(
    path: Path, options: Iterable[str] = (), evaluation_options: Iterable[str] = ()
) -> Ablation:
    """Read a file of rows, put further options behind its own, and check all but the options' values."""
    if not path.is_file():
        raise UserError(
            f"no file of rows '{path}'; give one such as train_configs/grounding_ablation.yaml"
        )
    given = read_yaml(path)
    try:
        ablation = merge_strictly(Ablation, given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}; it must be a block with config and rows"
        ) from None
    if not ablation.rows or not ablation.metrics:
        raise UserError(f"{path}: rows and metrics need one entry at least")
    ablation.rows = rows = {name: row or Row() for name, row in ablation.rows.items()}
    ablation.options += options
    ablation.evaluation_options += evaluation_options
    for name, row in rows.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "cache":
            raise UserError(
                f"row '{name}' names a folder: take letters, digits, '-', '_' and '.', and not 'cache'"
            )
        if row.same_run_as not in (None, *rows):
            raise unknown_name_error(f"row in same_run_as of row '{name}':", row.same_run_as, rows)
        if row.same_run_as and (row.options or rows[row.same_run_as].same_run_as):
            raise UserError(
                f"row '{name}': same_run_as needs a row that trains, and takes evaluation_options alone"
            )
    for part in (ablation, *rows.values()):
        for option in (*part.options, *part.evaluation_options):
            if not isinstance(option, str):
                raise UserError(f"{path}: there is an option {option}; write it as a.b=c")
            if option.partition("=")[0] in _OWN:
                raise UserError(
                    f"option '{option}': annexe ablate itself sets {', '.join(_OWN)}; remove it"
                )
    for key in (metric.rpartition(":")[2] for metric in ablation.metrics):
        if key not in METRICS and not key.startswith("grounding/miou/"):
            raise unknown_name_error("metric", key, METRICS)
    return ablation


def runs_of(ablation: Ablation, out: Path, name: str, seeds: Iterable[int]) -> list[Run]:
    """The runs of a row, its settings checked; an evaluation takes its training's data, unless options say else."""
    row, base = ablation.rows[name], ablation.rows[name].same_run_as or name
    options = [*ablation.options, *ablation.rows[base].options]
    config = load_config(ablation.config, options)
    if config.model is None or len(config.datasets) != 1:
        raise UserError(
            f"config '{ablation.config}' is of no training run; it needs one model and one data set"
        )
    ((dataset, own),) = config.datasets.items()
    asked = [
        f"datasets.{dataset}.{k}={'null' if own[k] is None else own[k]}" for k in _DATA if k in own
    ]
    asked += [*ablation.evaluation_options, *row.evaluation_options]
    of_model = [option for option in asked if option.startswith("model.")]
    load_config(ablation.config, [*options, *of_model])  # they stand over the trained model's
    datasets = load_config(
        ablation.evaluate, [*(o for o in asked if o not in of_model), "model=null"]
    ).datasets
    data_root = Path(datasets[dataset]["data_root"])

    def made_from(command: list[str]) -> list[str]:
        words = [word for word in command if word.partition("=")[0] not in _FREE]
        return [*words, *OmegaConf.to_yaml(read_yaml(Path(command[3]))).splitlines()]

    runs = []
    for seed in seeds:
        trained, folder = out / base / f"seed-{seed}", out / name / f"seed-{seed}" / "eval"
        train = ["python", TRAIN, "--cfg-path", ablation.config, "--options", *options]
        train += [f"run.seed={seed}", f"run.output_dir={trained}", "run.resume=auto"]
        training = Stage(trained, train, made_from(train))
        evaluate = [
            "python",
            EVALUATE,
            "--cfg-path",
            ablation.evaluate,
            "--dataset",
            dataset,
            "--options",
        ]
        evaluate += [f"run.checkpoint={trained}", f"run.output_dir={folder}", *asked]
        evaluation = Stage(folder, evaluate, [*training.made_from, *made_from(evaluate)])
        runs.append(Run(name, seed, training, evaluation, config.run.max_steps, data_root))
    return runs


def require_data(roots: set[Path], metrics: list[str]) -> None:
    """Data roots have to be there, with the lists of stems that metrics are asked of."""
    for root in sorted(roots):
        if not root.is_dir():
            raise UserError(
                f"no data root '{root}'; name another by --options, such as datasets.ego_irgbench.data_root=DIR"
            )
        there = {path.stem for path in (root / "subsets").glob("*.txt")}
        for subset, _, metric in (metric.rpartition(":") for metric in metrics):
            if subset not in ("", *there):
                raise unknown_name_error(f"subset of '{root}' in metric '{metric}':", subset, there)
