"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException


class UserError(ValueError):
    """Bad input. The message names the thing and the fix; entry points print it alone and exit with 2."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error anew with the worker's traceback before the message: keep the message.
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip())


def unknown(what: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the choices, with the nearest one pointed out."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, 1)
    if near and len(choices) > 12:
        return UserError(f"unknown {what} '{name}'. Did you mean '{near[0]}'?")
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {what} '{name}'.{hint} Choices: {', '.join(choices) or 'none'}")


def require_sizes(where: str, **sizes: int) -> None:
    """Raise a `UserError` for the first of a component's ``sizes`` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{where}.{name} is {size}; it must be at least 1")


def require_multiple(where: str, name: str, value: int, of: int, needed_by: str) -> None:
    """Raise a `UserError` unless a setting's ``value`` is a multiple of ``of``."""
    if value < 1 or value % of:
        raise UserError(f"{where}.{name} is {value}; it must be a multiple of {of}, for {needed_by}")


def over_defaults(schema: object, given: object, where: str = "") -> object:
    """``given`` over the defaults of ``schema``, a dataclass or an instance of one, as an instance.

    Raises:
        UserError: for an unknown key, a value of the wrong type, or a value where a block belongs.
    """
    defaults = OmegaConf.structured(schema)
    try:
        given = OmegaConf.create(given)
        _require_blocks(OmegaConf.to_container(defaults), given, where)
        return OmegaConf.to_object(OmegaConf.merge(defaults, given))
    except OmegaConfBaseException as error:
        raise refused(where, error) from None


def _require_blocks(defaults: dict, given: object, where: str) -> None:
    if not isinstance(given, DictConfig):
        raise UserError(f"{where or 'all of it'} is '{given}'; it must be a block of settings")
    for key, block in defaults.items():
        if isinstance(block, dict) and given.get(key) is not None:
            _require_blocks(block, given[key], ".".join(filter(None, [where, key])))


def refused(where: str, error: OmegaConfBaseException) -> UserError:
    """The error for a setting under ``where`` that OmegaConf refused, for its name, its value or its absence."""
    key = ".".join(filter(None, [where, error.full_key])) or "block"
    if isinstance(error, ConfigKeyError) and error.object_type is not None:
        return unknown(f"setting {key}: no", error.key, [field.name for field in fields(error.object_type)])
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"setting {key} is missing and has no default; add it")
    return UserError(f"setting {key}: {str(error).splitlines()[0]}")
