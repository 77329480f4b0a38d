"""What is asked of each photo: the same questions of all, or those that a table has for each."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from annexe.datasets.image_names import shown_line, warn_of_ignored
from annexe.errors import UserError
from annexe.files import read_text
from annexe.inference.predictor import check_question

log = logging.getLogger(__name__)

COLUMNS = ("photo", "question")
_DELIMITERS = (",", ";", "\t")  # of tables, as spreadsheets of several countries write them
_MAX_FIELD = 2**20  # characters of a field of a table
_NAMED = 3  # things that a warning names


class _Asked(NamedTuple):
    """A line of a table."""

    line: int
    photo: str
    question: str


def questions_of(
    files: Sequence[Path], asked: Sequence[str], ask_file: Path | None
) -> list[tuple[str, ...]]:
    """What is asked of each file.

    What a table asks of no file is counted and named in a warning, and so are the files of which
    it asks nothing.

    Args:
        files: photos and videos.
        asked: of all of them.
        ask_file: more questions: a text file with one a line, asked of all files, or a table
            (.csv or .jsonl) with the columns photo and question, each asked of its photo alone.
            A photo is named by its file name, with or without its ending and its folders.

    Raises:
        UserError: for a question that cannot be asked, and for a file that cannot be read or of
            which nothing is used.
    """
    for question in asked:
        check_question(question)
    own: list[list[str]] = [[] for _ in files]
    if ask_file is not None and ask_file.suffix.lower() in _READERS:
        own = _match(_READERS[ask_file.suffix.lower()](ask_file), files, ask_file)
    elif ask_file is not None:
        asked = [*asked, *_read_lines(ask_file)]
    return [(*asked, *questions) for questions in own]


# Files of questions


def _read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(
            f"--ask-file: cannot read '{path}' ({error.strerror}); name a text file, .csv or .jsonl"
        ) from None
    except ValueError as error:
        raise UserError(f"--ask-file: '{path}' is no text ({error}); save it in UTF-8") from None


def _lines(path: Path) -> io.StringIO:
    """The lines of a text file, whatever ends them."""
    return io.StringIO(_read_text(path), newline=None)


def _read_lines(path: Path) -> list[str]:
    """The questions of a text file, each once.

    Raises:
        UserError: naming the first line that cannot be asked; and if there is none.
    """
    if path.suffix.lower() in (".json", ".xlsx", ".xls", ".ods", ".tsv"):
        raise UserError(
            f"--ask-file: '{path}' is neither text nor table; save it as .txt with one question a "
            "line, or as .csv or .jsonl with photo and question"
        )
    questions: dict[str, None] = {}
    num_repeated = 0
    for number, line in enumerate(_lines(path), start=1):
        question = line.strip()
        if question:
            _check(question, path, number)
            num_repeated += question in questions
            questions[question] = None
    if not questions:
        raise UserError(f"--ask-file: '{path}' has no question; write one a line")
    _warn_of_repeated(path, num_repeated)
    return list(questions)


def _read_csv(path: Path) -> Iterator[_Asked]:
    """The lines of a table with a header.

    Raises:
        UserError: naming what is wrong with the header or a line.
    """
    # The header
    text = _read_text(path)
    header = text[:_MAX_FIELD].splitlines()[0] if text else ""
    delimiter = max(_DELIMITERS, key=header.count)
    csv.field_size_limit(_MAX_FIELD)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        missing = [column for column in COLUMNS if names.count(column) != 1]
        if missing:
            raise UserError(
                f"--ask-file: '{path}' needs one column '{missing[0]}', its first line has "
                f"{shown_line(header.strip())}; write the header photo,question"
            )
        warn_of_ignored(f"'{path}'", "columns", [name for name in names if name not in COLUMNS])

        # A question with a comma and no quotes is more fields than the header has
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(names):
                raise UserError(
                    f"--ask-file: '{path}', line {rows.line_num} has {len(row)} fields and the "
                    f"header {len(names)}; put questions with '{delimiter}' in double quotes"
                )
            photo, question = (row[names.index(column)].strip() for column in COLUMNS)
            yield _Asked(rows.line_num, photo, question)
    except csv.Error as error:
        raise UserError(
            f"--ask-file: '{path}', line {rows.line_num} is no CSV ({error}); "
            "close its quotes, or save it again"
        ) from None


def _read_jsonl(path: Path) -> Iterator[_Asked]:
    """The lines of a file with a JSON object on each.

    Raises:
        UserError: naming the first line that is no such object.
    """
    ignored: set[str] = set()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--ask-file: '{path}', line {number} is no JSON ({error}); write one object a line"
            ) from None
        if not isinstance(values, dict) or not all(
            isinstance(values.get(column), str) for column in COLUMNS
        ):
            raise UserError(
                f"--ask-file: '{path}', line {number} needs the texts 'photo' and 'question'; "
                'write {"photo": "a.jpg", "question": "Where is the mug?"}'
            )
        ignored.update(values.keys() - set(COLUMNS))
        yield _Asked(number, values["photo"].strip(), values["question"].strip())
    warn_of_ignored(f"'{path}'", "keys", ignored)


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}


def _check(question: str, path: Path, line: int) -> None:
    """Refuse a question that cannot be asked, and name its line."""
    try:
        check_question(question)
    except UserError as error:
        raise UserError(f"--ask-file: '{path}', line {line}: {error}") from None


# Lines to photos


def _match(lines: Iterator[_Asked], files: Sequence[Path], path: Path) -> list[list[str]]:
    """The questions of each file.

    Raises:
        UserError: for a question that cannot be asked, and if no line names any of the files.
    """
    # What every line asks of which file
    index_of = _Names(files)
    own: list[dict[str, None]] = [{} for _ in files]
    strangers: list[_Asked] = []
    num_lines = num_repeated = 0
    for asked in lines:
        _check(asked.question, path, asked.line)
        num_lines += 1
        index = index_of.find(asked.photo)
        if index is None:
            strangers.append(asked)
            continue
        num_repeated += asked.question in own[index]
        own[index][asked.question] = None

    # What is not used
    named = ", ".join(
        f"{shown_line(asked.photo)} (line {asked.line})" for asked in strangers[:_NAMED]
    )
    if len(strangers) == num_lines:
        problem = f"names none of the {len(files)} photos, but {named}" if named else "has no line"
        raise UserError(
            f"--ask-file: '{path}' {problem}; name photos by their file names, as in a.jpg"
        )
    if strangers:
        log.warning(
            "'%s': %d of %d questions are about no photo that was given: %s%s",
            *(path, len(strangers), num_lines, named, _and_more(len(strangers))),
        )
    without = [file for file, questions in zip(files, own, strict=True) if not questions]
    if without:
        log.warning(
            "'%s' asks nothing of %d of %d photos: %s%s",
            *(path, len(without), len(files), ", ".join(f"'{f}'" for f in without[:_NAMED])),
            _and_more(len(without)),
        )
    _warn_of_repeated(path, num_repeated)
    return [list(questions) for questions in own]


class _Names:
    """Finds a file by what a table calls it.

    Args:
        files: of different stems among photos, and among videos.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.parts = [_parts(os.path.abspath(file)) for file in files]
        self.by_name = {parts[-1]: index for index, parts in enumerate(self.parts)}
        self.by_stem: dict[str, int] = {}
        for index, file in enumerate(files):
            self.by_stem.setdefault(_normal(file.stem), index)

    def find(self, name: str) -> int | None:
        """Index of the file whose path ends with ``name``; the ending of the file may be left out.

        None where there is none.
        """
        *folders, last = _parts(name)
        index = self.by_name.get(last, self.by_stem.get(last))
        if index is None or (folders and self.parts[index][-len(folders) - 1 : -1] != folders):
            return None
        return index


def _parts(path: str) -> list[str]:
    """Folders and name of a path of this system or of Windows."""
    parts = _normal(path).replace("\\", "/").split("/")
    return [part for part in parts[:-1] if part != "."] + parts[-1:]


def _normal(name: str) -> str:
    """One of the ways to write letters with accents; disks of macOS have another than texts."""
    return unicodedata.normalize("NFC", name)


def _and_more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""


def _warn_of_repeated(path: Path, count: int) -> None:
    if count:
        log.warning("'%s': %d questions stand twice and are asked once", path, count)
