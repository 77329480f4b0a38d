"""Settings from YAML files and ``a.b=c`` options, each read as its own type asks.

YAML guesses types: it makes a number of 007, a flag of ``on`` and a comment of what follows `` #``.
Here a scalar stays the text that was typed until the type of its setting is known.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from annexe.errors import UserError, unknown_name_error

PathSetting = Annotated[str, "path"]
"""A file or a folder. ``~`` and ``$NAME`` are expanded; one that may be null takes ``false``."""

Block = Annotated[dict[str, Any], "block"]
"""Settings that are not read yet: every scalar is a text, or null."""

_NULL = ("", "~", "null", "Null", "NULL")
_NO = ("", "false", "no", "none", "off")
_YES = ("on", "true", "yes")
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
_YAML_STARTS = ("[", "{", '"', "'")  # of an option's value that is YAML and not a plain text
_OTHER_BASE = re.compile(r"[-+]?0[\d_]+|[-+]?\d[\d_]*:.*")  # 010 is 8 to YAML 1.1, and 1:30 is 90
_EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+")  # a number in YAML 1.2 alone

# What a value of a type has to be, for messages
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number, such as 10",
    float: "a number",
    str: "a text (in quotes, where YAML would read a list or a block)",
}


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar as the text that stands in the file, and nothing as null."""


for _tag in ("bool", "int", "float", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_yaml_str)


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """A YAML file as YAML understands it.

    Raises:
        UserError: for a missing file or bad YAML.
    """
    if not path.is_file():
        raise UserError(
            f"no configuration file '{path}'; give a YAML file such as "
            "train_configs/annexe_tiny.yaml"
        )
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read '{path}': {reason}; fix the YAML") from None


def read_settings(path: Path) -> DictConfig | ListConfig:
    """A YAML file whose scalars are the texts that stand in it, for `merge_strictly`.

    Raises:
        UserError: for a missing file or bad YAML.
    """
    as_yaml = read_yaml(path)  # refuses more than PyYAML, such as a key that stands twice
    if not as_yaml:
        return as_yaml
    with path.open(encoding="utf-8") as file:
        return OmegaConf.create(yaml.load(file, Loader=_TextLoader))


def read_options(options: Sequence[str]) -> DictConfig:
    """Options of the form ``a.b=c`` as nested settings, for `merge_strictly`.

    A value that begins with a bracket or a quotation mark is YAML. Any other is the text itself.

    Raises:
        UserError: for an option of another form.
        yaml.YAMLError: for a list, a block or a quoted text that does not end.
    """
    settings = OmegaConf.create()
    for option in options:
        name, sign, text = option.partition("=")
        if not name or not sign:
            raise UserError(f"option '{option}' is not of the form a.b=c")
        value = text if _is_plain(text) else yaml.load(text, Loader=_TextLoader)
        OmegaConf.update(settings, name, value)
    return settings


def as_option(name: str, value: object) -> str:
    """The option that sets ``name`` to a value, whatever text it is."""
    if value is None:
        return f"{name}=null"
    text = str(value)
    return f"{name}={text if _is_plain(text) else json.dumps(text, ensure_ascii=False)}"


def _is_plain(text: str) -> bool:
    """Whether an option's value is neither YAML nor null."""
    return text.strip() not in _NULL and not text.lstrip().startswith(_YAML_STARTS)


def overlay(lower: Any, upper: Any) -> DictConfig:
    """The settings of ``upper`` over those of ``lower``, block by block; a list replaces a list."""
    return OmegaConf.create(_overlay(_plain(lower), _plain(upper)))


def _plain(block: Any) -> Any:
    """A block as plain containers of its own, whether or not it is one of OmegaConf's."""
    return OmegaConf.to_container(block) if OmegaConf.is_config(block) else copy.deepcopy(block)


def _overlay(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)):
        return upper
    shared = {name: _overlay(lower[name], upper[name]) for name in lower.keys() & upper.keys()}
    return {**lower, **upper, **shared}


def merge_strictly(schema: type, settings: Any, where: str = "") -> Any:
    """``settings`` over the defaults of a dataclass.

    Args:
        settings: scalars may be texts, as `read_settings` and `read_options` give them.
        where: the place of the block in the configuration, for messages.

    Returns:
        An instance of the dataclass.

    Raises:
        UserError: for an unknown key, a value of the wrong type, or a value where a block belongs.
    """
    try:
        checked = _read_block(_plain(settings), schema, where)
        if _has_references(checked):
            merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), checked))
        else:
            # The same without OmegaConf, which takes several times as long
            merged = _make_block(schema, checked, where)
    except OmegaConfBaseException as error:
        raise setting_error(where, error) from None
    _expand_paths(merged, where)
    return merged


def setting_error(where: str, error: OmegaConfBaseException) -> UserError:
    """The error for a setting under ``where`` that OmegaConf refused."""
    key = f"{where}.{error.full_key or ''}".strip(".") or "block"
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"setting {key} is missing and has no default; add it")
    reason = str(error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        reason += "; an environment variable is ${oc.env:NAME}, or $NAME in a path"
    return UserError(f"setting {key}: {reason}")


def _has_references(value: Any) -> bool:
    """Whether a text in a nest of containers is ``???``, or refers to another setting."""
    if isinstance(value, dict):
        return any(map(_has_references, value.values()))
    if isinstance(value, list):
        return any(map(_has_references, value))
    return _is_reference(value)


def _is_reference(value: Any) -> bool:
    """Whether a value is a text that OmegaConf has to resolve."""
    return isinstance(value, str) and ("${" in value or value == MISSING)


def _make_block(kind: Any, values: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass from values that `_read_block` gave.

    Raises:
        UserError: for a setting that is missing and has no default.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    made = {}
    for field in fields(kind):
        key = f"{where}.{field.name}".lstrip(".")
        if field.name in values:
            made[field.name] = _make(values[field.name], hints[field.name], key)
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or default == MISSING:
            raise UserError(f"setting {key} is missing and has no default; add it")
        made[field.name] = _as_read(default, hints[field.name])
    return kind(**made)


def _make(value: Any, hint: Any, key: str) -> Any:
    """A value that `_read` gave, with instances for what its type has as dataclasses."""
    for kind in _members(hint):
        if is_dataclass(kind) and isinstance(value, dict):
            return _make_block(kind, value, key)
        if typing.get_origin(kind) is dict and isinstance(value, dict):
            of_values = typing.get_args(kind)[1]
            return {name: _make(each, of_values, f"{key}.{name}") for name, each in value.items()}
    return value


def _as_read(default: Any, hint: Any) -> Any:
    """A default as a file would give it: 1 is 1.0 where the type is float, a tuple is a list."""
    if is_dataclass(default) and not isinstance(default, type):
        hints = typing.get_type_hints(type(default), include_extras=True)
        return type(default)(
            **{name: _as_read(value, hints[name]) for name, value in vars(default).items()}
        )
    if isinstance(default, tuple):
        return list(default)
    if isinstance(default, int) and not isinstance(default, bool) and float in _members(hint):
        return default if int in _members(hint) else float(default)
    return copy.deepcopy(default)


# Values by their types


def _read(value: Any, hint: Any, key: str) -> Any:
    """A setting's value as its type asks.

    Raises:
        UserError: if it is of another type.
    """
    if _is_reference(value):
        return value
    kinds = _members(hint)
    if value is None:
        return _read_null(kinds, key)
    kinds = [kind for kind in kinds if kind is not type(None)]
    if len(kinds) == 1:
        return _read_one(value, kinds[0], key)

    # Several types: the one that YAML sees, else text
    seen = _by_yaml(value) if isinstance(value, str) else value
    if type(seen) in kinds and not isinstance(seen, str):
        return seen
    return _read_one(value, str if str in kinds else kinds[0], key)


def _members(hint: Any) -> list[Any]:
    """The types that a setting may have; ``NoneType`` is one of them where it may be null."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        members = [each for each in typing.get_args(hint) if each is not type(None)]
        return members if len(members) == len(typing.get_args(hint)) else [*members, type(None)]
    return [hint]


def _read_null(kinds: list[Any], key: str) -> Any:
    """What null means: null where that may be, else a block's defaults."""
    if type(None) in kinds or Any in kinds:
        return None
    for kind in kinds:
        if is_dataclass(kind):
            return dict(getattr(kind, "WHEN_NULL", {}))
        if kind is Block or typing.get_origin(kind) is dict:
            return {}
    tilde = " (as ~ alone is; the home folder is ~/)" if PathSetting in kinds else ""
    raise UserError(f"{key} is null{tilde}; give it a value, or leave it out")


def _read_one(value: Any, kind: Any, key: str) -> Any:
    """A value that is not null as one type asks."""
    # Blocks and lists
    if kind is Block:
        _require(isinstance(value, dict), key, value, "a block of settings")
        return value
    if is_dataclass(kind):
        return _read_block(value, kind, key)
    if typing.get_origin(kind) is dict:
        _require(isinstance(value, dict), key, value, "a block of settings")
        of_values = typing.get_args(kind)[1]
        return {name: _read(each, of_values, f"{key}.{name}") for name, each in value.items()}
    if typing.get_origin(kind) is list:
        example = " ".join(str(value).split())
        _require(isinstance(value, list), key, value, f"a list, such as [{example}]")
        (of_items,) = typing.get_args(kind)
        return [_read(each, of_items, f"{key}[{i}]") for i, each in enumerate(value)]

    # Scalars
    if kind in (str, PathSetting):
        _require(isinstance(value, str), key, value, _KINDS[str])
        return value
    if kind in (bool, int, float):
        scalar = _scalar(value, kind)
        _require(scalar is not None, key, value, _KINDS[kind])
        return scalar
    return _resolved(value)


def _read_block(value: Any, kind: Any, where: str) -> dict[str, Any]:
    """The settings of a dataclass, each as its field asks."""
    _require(isinstance(value, dict), where or "all of it", value, "a block of settings")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]
    read = {}
    for name, each in value.items():
        key = f"{where}.{name}".lstrip(".")
        if name not in names:
            raise unknown_name_error(f"setting {key}: no", name, names)
        read[name] = _read(each, hints[name], key)
    return read


def _scalar(value: Any, kind: type) -> bool | int | float | None:
    """A flag or number from a text or a value, or None if it is something else."""
    text = value.strip().lower() if isinstance(value, str) else None
    seen = _by_yaml(value) if isinstance(value, str) else value
    if kind is bool:
        if text in ("y", "n"):
            return text == "y"
        return bool(seen) if isinstance(seen, int) and seen in (0, 1) else None
    if isinstance(seen, bool):
        return None
    if kind is int:
        return seen if isinstance(seen, int) else None
    try:
        number = float(seen) if isinstance(seen, str | int | float) else math.nan
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _by_yaml(text: str) -> Any:
    """The number, flag, null or text that YAML makes of a scalar; 010 and 1:30 are no numbers."""
    if _OTHER_BASE.fullmatch(text.strip()):
        return text
    try:
        seen = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    if isinstance(seen, str) and _EXPONENT.fullmatch(seen):
        return float(seen)
    return seen if seen is None or isinstance(seen, bool | int | float | str) else text


def _resolved(value: Any) -> Any:
    """A value for which no type is known, as YAML understands it."""
    if isinstance(value, dict):
        return {name: _resolved(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each) for each in value]
    is_plain = isinstance(value, str) and not _is_reference(value)
    return _by_yaml(value) if is_plain else value


def _require(holds: bool, key: str, value: Any, what: str) -> None:
    """Raise a `UserError` on a value that is not ``what`` its setting needs."""
    if not holds:
        shown = " ".join(str(value).split())
        raise UserError(f"{key} is '{shown}'; it must be {what}")


# Paths


def _expand_paths(block: Any, where: str) -> None:
    """Expand every path of a dataclass and of those in it."""
    hints = typing.get_type_hints(type(block), include_extras=True)
    for field in fields(block):
        key = f"{where}.{field.name}".lstrip(".")
        value = getattr(block, field.name)
        kinds = _members(hints[field.name])
        if is_dataclass(value):
            _expand_paths(value, key)
        elif isinstance(value, str) and PathSetting in kinds:
            path = read_path(value, key, optional=type(None) in kinds)
            setattr(block, field.name, path)


def read_path(text: str, key: str, *, optional: bool) -> str | None:
    """The path that a setting names, with ``~`` and ``$NAME`` expanded.

    Args:
        key: the setting, for messages.
        optional: ``false`` and other words of its kind mean none.

    Raises:
        UserError: for an unknown user or variable, and for a word that is no path.
    """
    if optional and text.lower() in _NO:
        return None
    if optional and text.lower() in _YES:
        raise UserError(f"{key} is '{text}'; it must be a path, or null for none")
    if not text.strip():
        raise UserError(f"{key} is empty; name a file or folder ('.' is the present one)")
    for name in _VARIABLE.findall(text):
        if name not in os.environ:
            raise UserError(f"{key} is '{text}', but ${name} is not set; export it")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if text.startswith("~") and expanded == text:
        user = text.partition("/")[0]
        raise UserError(f"{key} is '{text}', but there is no user of {user}; write './{text}'")
    return expanded
