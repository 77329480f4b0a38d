"""Measures one configuration, or two one after the other, and arranges the records in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from annexe.benchmarks.machine import release_memory
from annexe.benchmarks.units import Record
from annexe.build import load_config
from annexe.config import Config

RATIO = "ratio"  # what a comparison adds to the two records


@dataclass
class Table:
    """Cells of a table as text.

    Attributes:
        rows: a name and then a cell for each further header.
    """

    title: str
    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)


def compare(
    measure: Callable[[Config], tuple[Record, list[str]]],
    cfg_path: str,
    options: list[str],
    against: list[str] | None,
) -> tuple[Record, dict[str, Record]]:
    """Measure a configuration, and then the same with further options.

    Args:
        measure: gives a record and notes.
        options: put over the file of the configuration.
        against: put over those for the second one, if there is to be one.

    Returns:
        What to add to the report, and the records by name. Of two configurations there is also a
        record of the first one's numbers over the second one's.

    Raises:
        UserError: for a wrong configuration, or one that cannot be measured.
    """
    # Both are read before the first is measured
    configs = {"measured": load_config(cfg_path, options)}
    if against:
        configs["against"] = load_config(cfg_path, [*options, *against])

    # One after the other, with each note once
    records: dict[str, Record] = {}
    notes: list[str] = []
    for name, config in configs.items():
        records[name], more_notes = measure(config)
        release_memory()
        notes += [note for note in more_notes if note not in notes]
    if against:
        records[RATIO] = ratio(records["measured"], records["against"])
        notes.append(f"against: the same with {' '.join(against)}, measured afterwards")

    report = {"against_options": against, "notes": notes, "against": None, RATIO: None} | records
    return report, records if against else {"": records["measured"]}


def ratio(measured: Record, against: Record) -> Record:
    """Every number of one record divided by that of the other.

    Numbers that one of them does not have, or that are 0, are left out.
    """
    quotients: Record = {}
    for key, value in measured.items():
        other = against.get(key)
        if value and other:
            quotients[key] = ratio(value, other) if isinstance(value, dict) else value / other
    return quotients


def tables(report: Record, columns: dict[str, Record]) -> list[Table]:
    """Records as tables, a column a record.

    Everything that is split by part of the model or of the time has a table of its own, without the
    ratio.

    Args:
        report: says what was measured (``what``) and on which ``machine``.
        columns: the records by the headers of their columns.
    """
    machine = report["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    title = f"annexe bench {report['what']} on {device}, torch {machine['torch']}"
    # All that is no part of something, in one table
    numbers = {name: dict(_plain_numbers(record)) for name, record in columns.items()}
    main = Table(title, ["", *columns])
    for label in _in_order(*numbers.values()):
        main.rows.append([label, *(_cell(record.get(label)) for record in numbers.values())])

    # What is split by part
    records = {name: record for name, record in columns.items() if name != RATIO}
    first = next(iter(records.values()))
    split_keys = [key for key, value in first.items() if _is_split(value)]
    return [main, *(_table_by_part(key, records) for key in split_keys)]


def _table_by_part(key: str, records: dict[str, Record]) -> Table:
    """What all records have under ``key``, a row a part."""
    first = next(iter(records.values()))
    units = list(first[key]["all"])
    headers = [f"{unit} {name}".strip() for name in records for unit in units]
    table = Table(_words(key), ["", *headers])
    for part in _in_order(*(record[key] for record in records.values())):
        cells = []
        for record in records.values():
            values = record[key].get(part, {})
            cells += [_cell(values.get(unit)) for unit in units]
        table.rows.append([_words(part), *cells])
    return table


def _plain_numbers(record: Record) -> Iterator[tuple[str, float | None]]:
    """Label and value of every number that is not split by part."""
    for key, value in record.items():
        if not isinstance(value, dict):
            yield _words(key), value
        elif not _is_split(value):
            for name, part in value.items():
                yield f"{_words(key)}: {_words(name)}", part


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and "all" in value


def _in_order(*records: Record) -> list[str]:
    """The keys of all records, each once."""
    keys: dict[str, None] = {}
    for record in records:
        keys |= dict.fromkeys(record)
    return list(keys)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
