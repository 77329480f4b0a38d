"""Named components: ``@register(kind, name)`` adds one, ``build(kind, spec)`` makes one.

What YAML may set are a component's keyword-only arguments; what the code injects stands before the ``*``.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any

from omegaconf import MISSING

from annexe.errors import over_defaults, unknown

_COMPONENTS: dict[str, dict[str, Callable]] = {}


def register(kind: str, name: str) -> Callable[[Callable], Callable]:
    """Register a class or function as component ``name`` of ``kind``; a name that is taken raises."""

    def add(component: Callable) -> Callable:
        if _COMPONENTS.setdefault(kind, {}).setdefault(name, component) is not component:
            raise ValueError(f"{kind} '{name}' is registered twice: {_COMPONENTS[kind][name]} and {component}")
        return component

    return add


def settings(kind: str, spec: dict[str, Any], where: str) -> dict[str, Any]:
    """Check ``spec`` (``type`` plus arguments) against its component's signature and fill in the defaults."""
    given = {key: value for key, value in spec.items() if key != "type"}
    if spec.get("type") not in _COMPONENTS.get(kind, {}):
        raise unknown(f"{where}.type", spec.get("type"), _COMPONENTS.get(kind, {}))
    component = _COMPONENTS[kind][spec["type"]]
    hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    options = {p.name: p for p in inspect.signature(component).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key in given.keys() - options.keys():
        raise unknown(f"setting {where}.{key}: '{spec['type']}' has no", key, options)
    defaults = {name: MISSING if p.default is p.empty else p.default for name, p in options.items()}
    fields = [(n, hints[n], field(default_factory=lambda value=v: value)) for n, v in defaults.items()]
    checked = over_defaults(make_dataclass("Settings", fields), given, where)
    return {name: getattr(checked, name) for name in options}


def build(kind: str, spec: dict[str, Any], *parts: Any) -> Any:
    """Make the component that ``spec`` names from its settings and the injected ``parts``."""
    arguments = settings(kind, spec, kind)
    return _COMPONENTS[kind][spec["type"]](*parts, **arguments)
