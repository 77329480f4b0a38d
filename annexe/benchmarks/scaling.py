"""Training by several processes beside that by one: how much of each GPU's own speed is left."""

from __future__ import annotations

from pathlib import Path

from annexe.benchmarks.units import Record
from annexe.checkpoints.tensor_files import read_json
from annexe.errors import UserError

# What has to be the same for rates to compare; the machine has the last one
_SAME = ("config", "options")
_SAME_MACHINE = ("gpu", "cpu", "torch")


def read_earlier(files: list[Path], report: Record) -> list[Record]:
    """What `annexe bench train --json` measured before, one process among it.

    Args:
        files: that it wrote.
        report: of the run that they are shown beside, as far as it is known before measuring.

    Returns:
        The reports of the files.

    Raises:
        UserError: for another file, a measurement of something else, or none by one process.
    """
    reports: list[Record] = []
    for file in files:
        if not file.is_file():
            raise UserError(f"--beside: there is no file '{file}'; write it with --json")
        earlier = read_json(file)
        is_report = isinstance(earlier, dict) and earlier.get("what") == "train"
        if not is_report or "processes" not in earlier.get("measured", {}):
            raise UserError(f"--beside: '{file}' was not written by annexe bench train --json")
        _require_comparable(file, earlier, report)
        reports.append(earlier)
    if files and not any(earlier["measured"]["processes"] == 1 for earlier in reports):
        raise UserError(
            "--beside: none of the files is of one process; measure it without torchrun first"
        )
    return reports


def _require_comparable(file: Path, earlier: Record, report: Record) -> None:
    """Check that two reports are of the same work on the same kind of machine.

    Raises:
        UserError: naming what differs.
    """
    pairs = [(name, earlier.get(name), report[name]) for name in _SAME]
    for name in _SAME_MACHINE:
        pairs.append((name, earlier["machine"].get(name), report["machine"][name]))
    for name, there, here in pairs:
        if there != here:
            raise UserError(
                f"--beside: '{file}' was measured with {name} {there}, not {here}; measure it again"
            )


def beside(measured: Record, earlier: list[Record]) -> dict[str, Record]:
    """Columns of a table, by number of processes, each with its ``efficiency``.

    That is the rate of one of its processes over that of one process alone.

    Args:
        measured: by this run; it gets its efficiency.
        earlier: reports of others, as `read_earlier` gives them.

    Raises:
        UserError: if batches were of another size.
    """
    records = [report["measured"] for report in earlier] + [measured]
    records.sort(key=lambda record: record["processes"])
    single = records[0]
    columns = {}
    for record in records:
        for name in ("images_per_step", "queries_per_image", "tokens_per_image"):
            count = record["processes"] if name == "images_per_step" else 1
            if abs(record[name] / count - single[name]) > 1e-6 * single[name]:
                raise UserError(
                    f"--beside: {name.replace('_', ' ')} of {record['processes']} process(es) is "
                    f"{record[name]:g}, of one {single[name]:g}; measure all with the same batches"
                )
        rate = record["images_per_second_per_process"]
        record["efficiency"] = rate / single["images_per_second"]
        name = "1 process" if record["processes"] == 1 else f"{record['processes']} processes"
        columns[name] = record
    return columns
