"""The one exception for mistakes that a user can fix."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 1
_SHOWN.maxlist = _SHOWN.maxdict = 3
_MANY_CHOICES = 12  # more are not listed where the nearest one is known


class UserError(ValueError):
    """Bad input.

    The message names the thing and the fix; entry points print it alone and exit with 2.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error anew, with the worker's traceback before the message
        prefix = f"{__name__}.{type(self).__name__}: "
        super().__init__(message.rpartition(prefix)[2].rstrip())


def unknown_name_error(what: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the choices, with the nearest one pointed out."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(str(name), choices, 1)
    if nearest and len(choices) > _MANY_CHOICES:
        return UserError(f"unknown {what} '{name}'. Did you mean '{nearest[0]}'?")
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return UserError(f"unknown {what} '{name}'.{hint} Choices: {', '.join(choices) or 'none'}")


def require_sizes(where: str, **sizes: int) -> None:
    """Raise a `UserError` for the first of a component's ``sizes`` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{where}.{name} is {size}; it must be at least 1")


def require_multiple(where: str, name: str, value: int, of: int, needed_by: str) -> None:
    """Raise a `UserError` unless a setting's ``value`` is a multiple of ``of``."""
    if value < 1 or value % of:
        raise UserError(
            f"{where}.{name} is {value}; it must be a multiple of {of}, for {needed_by}"
        )


def require_adapter(where: str, alpha: float, dropout: float) -> None:
    """Raise a `UserError` for a factor or a dropout that low-rank adapters cannot have."""
    if not 0 < alpha < math.inf:
        raise UserError(f"{where}.alpha is {alpha}; it must be a number above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"{where}.dropout is {dropout}; it must be at least 0 and below 1")


def shown(value: Any) -> str:
    """A value in one short line, the beginning of what is long."""
    return _SHOWN.repr(value)


def explain_mismatch(message: str, value: Any) -> tuple[str, str]:
    """What msgspec found wrong with ``value``: where in it, and in which way.

    "Expected `int` >= 0 - at `$.masks[0].slot`" becomes "masks[0].slot" and "is -1, expected int >=
    0". The place of ``value`` itself is empty.
    """
    problem, _, path = message.replace("`", "").partition(" - at $")
    missing = re.fullmatch(r"Object missing required field (\w+)", problem)
    if missing:
        return f"{path}.{missing[1]}".removeprefix("."), "is missing"

    # Follow the path to the value
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[key or int(index)]
    expected = problem[0].lower() + problem[1:]
    return path.removeprefix("."), f"is {shown(value)}, {expected}"
