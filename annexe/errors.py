"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the thing and the fix; entry points print it alone and exit with 2."""


def unknown(what: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the choices, with the nearest one pointed out."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {what} '{name}'.{hint} Choices: {', '.join(choices) or 'none'}")
