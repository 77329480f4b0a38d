"""What a run leaves to read: log.jsonl, manifest.json, a progress bar.

Where it is enabled, Weights & Biases gets the records of log.jsonl too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich import progress as rich_progress
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from annexe.checkpoints.manifest import MANIFEST_FILE
from annexe.checkpoints.run_folder import Progress
from annexe.config import Config, as_dict
from annexe.errors import UserError
from annexe.files import append_text, write_text


class LossWindow:
    """Loss terms since the last log line; nothing waits for the device before they are read.

    Args:
        names: of the terms.
        num_datasets: of which each has totals of its own, else 0.
        device: of the totals.
    """

    def __init__(self, names: list[str], num_datasets: int, device: torch.device) -> None:
        self.names = names
        shape = (3, 1 + num_datasets, len(names))
        self.totals, self.units, self.first_bad = torch.zeros(shape, device=device)
        self.norm = torch.zeros((), device=device)
        self.steps = 0
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0 = none

    def add(self, totals: Tensor, units: Tensor, norm: Tensor) -> None:
        """Add a step: this rank's term totals, the units over all ranks, the gradient norm."""
        self.totals += totals
        self.units += units
        self.norm = norm
        self.steps += 1
        is_first = ~torch.isfinite(norm) & (self.bad_step == 0)
        self.bad_step = torch.where(is_first, self.steps, self.bad_step)
        self.first_bad = torch.where(is_first, totals, self.first_bad)

    def require_finite(self, step: int, checkpoints: Path) -> None:
        """Stop where a gradient was not finite.

        Args:
            step: the optimizer step that was added last.
            checkpoints: where those of the run are.

        Raises:
            UserError: names the step and the total of every term in it.
        """
        bad_step = int(self.bad_step)
        if not bad_step:
            return
        totals = []
        for name, total in zip(self.names, self.first_bad[0].tolist(), strict=True):
            totals.append(f"{name} {total:g}")
        raise UserError(
            f"loss or gradient is not finite at step {step - self.steps + bad_step} "
            f"(term totals: {', '.join(totals)}); the last checkpoint in '{checkpoints}' is "
            "intact. Lower run.learning_rate or check the data"
        )

    def means(self, totals: Tensor) -> list[dict[str, float]]:
        """Mean of every term, from the ``totals`` over all ranks.

        Returns:
            The means over all images, then those of each data set without the terms that it lacks.
        """
        means = (totals / self.units.clamp(min=1)).tolist()
        of_all, *by_dataset = [dict(zip(self.names, row, strict=True)) for row in means]
        for terms, units in zip(by_dataset, self.units[1:].tolist(), strict=True):
            for name, num_units in zip(self.names, units, strict=True):
                if not num_units:
                    del terms[name]
        return [of_all, *by_dataset]


class RunLogger:
    """Writes a run's records; on other ranks than the main one it writes nothing."""

    def __init__(self, config: Config, output: Path, progress: Progress, *, enabled: bool) -> None:
        self.config = config
        self.output = output
        self.enabled = enabled
        self.path = output / "log.jsonl"
        self.wandb: Any = None
        self.loss = ""  # of the last train record, for the progress bar
        self.previous = (time.perf_counter(), progress.images)  # of the last train record
        if enabled:
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(config))))
            self._rewind(progress.step)
            if config.run.wandb.enabled:
                self.wandb = start_wandb(config, output)

    def _rewind(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint that a resumed run starts from."""
        lines = []
        if step and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
        write_text(self.path, "".join(line for line in lines if _step_of(line) <= step))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; a train record gets its speed since the one before."""
        if not self.enabled:
            return
        if record["kind"] == "train":
            now = time.perf_counter()
            previous_time, previous_images = self.previous
            num_images = record["images"] - previous_images
            record["images_per_second"] = num_images / (now - previous_time)
            self.previous = (now, record["images"])
            self.loss = f"loss {record['loss']:.3f}"
        append_text(self.path, json.dumps(record) + "\n")
        if self.wandb:
            values = {}
            for key, value in record.items():
                if key not in ("kind", "step"):
                    values[f"{record['kind']}/{key}"] = value
            self.wandb.log(values, record["step"])

    def write_manifest(self, progress: Progress, manifest: dict[str, Any]) -> None:
        """Write what is needed to tell and repeat the run.

        Args:
            manifest: that of its checkpoints, see `annexe.checkpoints.manifest`.
        """
        if not self.enabled:
            return
        manifest = {**manifest, "progress": asdict(progress), "config": as_dict(self.config)}
        write_text(self.output / MANIFEST_FILE, json.dumps(manifest, indent=1))

    @contextmanager
    def bar(self, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over optimizer steps, showing the last logged loss."""
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        timing = (TimeElapsedColumn(), TimeRemainingColumn())
        with rich_progress.Progress(
            *columns, *timing, refresh_per_second=2, disable=not self.enabled
        ) as bar:
            task = bar.add_task("", completed=done, total=total, loss="")
            yield lambda step: bar.update(task, completed=step, loss=self.loss)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def _step_of(line: str) -> float:
    """The step of a line of the log; after all others for one that was cut short or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def start_wandb(config: Config, output: Path) -> Any:
    """Start a Weights & Biases run; its files go under ``output``."""
    try:
        # Imported here, because the package is optional
        import wandb
    except ImportError:
        raise UserError(
            "run.wandb.enabled needs the package wandb: pip install 'annexe[wandb]'"
        ) from None
    settings = config.run.wandb
    mode: Any = settings.mode  # `WandbConfig` has checked it
    try:
        return wandb.init(
            project=settings.project,
            name=settings.name,
            mode=mode,
            dir=str(output),
            config=as_dict(config),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"run.wandb: {reason}; run `wandb login`, or set run.wandb.mode=offline"
        ) from None
