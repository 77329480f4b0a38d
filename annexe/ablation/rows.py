"""Rows of an ablation, and the trainings and evaluations they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from annexe.build import load_config
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.config import Config
from annexe.errors import UserError, unknown_name_error
from annexe.report.tables import GROUPS, MEAN_ACCURACY
from annexe.settings import PathSetting, as_option, merge_strictly, read_settings, read_yaml

TRAIN = "train.py"
EVALUATE = "eval_scripts/eval_egoirgbench.py"


def _known_metrics() -> set[str]:
    """Metrics that a table may show, `grounding/miou/...` aside."""
    known = {
        "consistency/contradictions",
        "calibration/confidence",
        "calibration/accuracy",
        "grounding/slot_ciou",
    }
    for group in GROUPS.values():
        known |= {metric.key for metric in group if metric.key != MEAN_ACCURACY}
    known |= {f"grounding/slot_precision@0.{tenth}" for tenth in range(5, 10)}
    known |= {f"presence/risk@{coverage}" for coverage in (0.5, 0.7, 0.8, 0.9, 1.0)}
    return known


METRICS = _known_metrics()

# Settings that `annexe ablate` itself sets
_SET_HERE = ("run.output_dir", "run.seed", "run.resume", "run.checkpoint")
# Settings that may differ between calls: a run is the same, and its folder names its seed
_MAY_DIFFER = (*_SET_HERE, "run.num_workers")
# Settings of the data set in which an evaluation follows its training
_OF_DATA = ("data_root", "answer_format", "exclude", "split_dir")


@dataclass
class Row:
    """What a row changes; with ``same_run_as`` it evaluates the run of another row differently."""

    note: str = ""
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)
    same_run_as: str | None = None


@dataclass
class Ablation:
    """A file of rows; a row's options are put over these."""

    config: PathSetting = MISSING
    evaluate: PathSetting = MISSING
    metrics: list[str] = MISSING
    rows: dict[str, Row | None] = MISSING  # nothing behind a name: a row without changes
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """A row by its name."""
        return self.rows[name] or Row()


@dataclass(frozen=True)
class Stage:
    """A training or an evaluation.

    Attributes:
        command: that runs it.
        made_from: all options and lines of YAML files that its result depends on.
    """

    folder: Path
    command: list[str]
    made_from: list[str]

    def require_unchanged(self) -> None:
        """Refuse to resume, or to show, work that was made from other settings.

        Raises:
            UserError: naming the first settings that differ.
        """
        file = self.folder / "ablation.json"
        saved = json.loads(file.read_text()) if file.is_file() else []
        holds_work = find_checkpoint(self.folder) or (self.folder / "metrics.json").is_file()
        if not holds_work or saved == self.made_from:
            return

        different = []
        for part in (*self.made_from, *saved):
            if (part in saved) != (part in self.made_from):
                different.append(part.strip())
        reason = f"all that '{file}' should hold"
        if saved:
            reason = ", ".join(different[:3]) or "their order"
        raise UserError(
            f"'{self.folder}' was made from settings that differ in {reason}; take them back, "
            "remove this folder, or choose another --out"
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
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def metrics(self) -> Path:
        """The file whose presence says that the run is finished."""
        return self.evaluation.folder / "metrics.json"


def read_ablation(
    path: Path, options: Iterable[str] = (), evaluation_options: Iterable[str] = ()
) -> Ablation:
    """Read a file of rows, put further options over its own, and check all but their values.

    Raises:
        UserError: for a missing or wrong file, an unknown metric, or a row that cannot be.
    """
    if not path.is_file():
        raise UserError(
            f"no file of rows '{path}'; give one such as train_configs/grounding_ablation.yaml"
        )
    # The file, strictly
    content = read_settings(path)
    try:
        ablation = merge_strictly(Ablation, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; it must be a block with config and rows") from None
    assert isinstance(ablation, Ablation)
    if not ablation.rows or not ablation.metrics:
        raise UserError(f"{path}: rows and metrics need one entry at least")

    # A row without settings is empty in the file; further options stand behind its own
    rows = {name: row or Row() for name, row in ablation.rows.items()}
    ablation.rows = {**rows}
    ablation.options += options
    ablation.evaluation_options += evaluation_options

    # Rows, options and metrics
    for name, row in rows.items():
        _check_row(name, row, rows)
    blocks: list[Ablation | Row] = [ablation, *rows.values()]
    for block in blocks:
        _check_options([*block.options, *block.evaluation_options])
    for metric in ablation.metrics:
        key = metric.rpartition(":")[2]
        if key not in METRICS and not key.startswith("grounding/miou/"):
            raise unknown_name_error("metric", key, METRICS)
    return ablation


def _check_row(name: str, row: Row, rows: dict[str, Row]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "cache":
        raise UserError(
            f"row '{name}' names a folder: take letters, digits, '-', '_' and '.', and not 'cache'"
        )
    if row.same_run_as is None:
        return
    if row.same_run_as not in rows:
        raise unknown_name_error(f"row in same_run_as of row '{name}':", row.same_run_as, rows)
    if row.options or rows[row.same_run_as].same_run_as:
        raise UserError(
            f"row '{name}': same_run_as needs a row that trains, and takes evaluation_options alone"
        )


def _check_options(options: list[str]) -> None:
    for option in options:
        if option.partition("=")[0] in _SET_HERE:
            names = ", ".join(_SET_HERE)
            raise UserError(f"option '{option}': annexe ablate itself sets {names}; remove it")


def runs_of(ablation: Ablation, out: Path, name: str, seeds: Iterable[int]) -> list[Run]:
    """The runs of a row, with its settings checked.

    An evaluation takes its training's data, unless options say otherwise.

    Raises:
        UserError: for a wrong setting.
    """
    # Training
    row = ablation.row(name)
    base = row.same_run_as or name
    options = [*ablation.options, *ablation.row(base).options]
    config = load_config(ablation.config, options)
    if config.model is None or len(config.datasets) != 1:
        raise UserError(
            f"config '{ablation.config}' is of no training run; it needs one model and one data set"
        )
    ((dataset, _),) = config.datasets.items()

    # Evaluation
    evaluation_options = [
        *_data_options(config),
        *ablation.evaluation_options,
        *row.evaluation_options,
    ]
    data_root = _evaluated_data_root(ablation, options, evaluation_options, dataset)

    runs = []
    for seed in seeds:
        folder = out / base / f"seed-{seed}"
        command = ["python", TRAIN, "--cfg-path", ablation.config, "--options", *options]
        command += [f"run.seed={seed}", as_option("run.output_dir", folder), "run.resume=auto"]
        training = Stage(folder, command, _made_from(command, ablation.config))

        eval_folder = out / name / f"seed-{seed}" / "eval"
        command = ["python", EVALUATE, "--cfg-path", ablation.evaluate, "--dataset", dataset]
        command += ["--options", as_option("run.checkpoint", folder)]
        command += [as_option("run.output_dir", eval_folder)]
        command += evaluation_options
        made_from = [*training.made_from, *_made_from(command, ablation.evaluate)]
        evaluation = Stage(eval_folder, command, made_from)
        runs.append(Run(name, seed, training, evaluation, config.run.max_steps, data_root))
    return runs


def _data_options(config: Config) -> list[str]:
    """The options that give an evaluation the data of a training."""
    ((dataset, settings),) = config.datasets.items()
    options = []
    for name in _OF_DATA:
        if name in settings:
            options.append(as_option(f"datasets.{dataset}.{name}", settings[name]))
    return options


def _evaluated_data_root(
    ablation: Ablation, options: list[str], evaluation_options: list[str], dataset: str
) -> Path:
    """The data root of an evaluation, whose options are checked on the way.

    Those of the model are put over the trained model's.
    """
    of_model = [option for option in evaluation_options if option.startswith("model.")]
    others = [option for option in evaluation_options if option not in of_model]
    load_config(ablation.config, [*options, *of_model])
    evaluation = load_config(ablation.evaluate, [*others, "model=null"])
    return Path(evaluation.datasets[dataset]["data_root"])


def _made_from(command: list[str], cfg_path: str) -> list[str]:
    """What the result of a command depends on: its words, and the lines of its YAML file."""
    words = [word for word in command if word.partition("=")[0] not in _MAY_DIFFER]
    return [*words, *OmegaConf.to_yaml(read_yaml(Path(cfg_path))).splitlines()]


def require_data(roots: set[Path], metrics: list[str]) -> None:
    """Check that data roots are there, with the lists of images that metrics are asked of.

    Raises:
        UserError: naming what is missing.
    """
    for root in sorted(roots):
        if not root.is_dir():
            raise UserError(
                f"no data root '{root}'; name another by --options, such as "
                "datasets.ego_irgbench.data_root=DIR"
            )
        subsets = {path.stem for path in (root / "subsets").glob("*.txt")}
        for metric in metrics:
            subset = metric.rpartition(":")[0]
            if subset and subset not in subsets:
                what = f"subset of '{root}' in metric '{metric}':"
                raise unknown_name_error(what, subset, subsets)
