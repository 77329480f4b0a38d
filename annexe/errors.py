"""The one exception for mistakes that a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
