"""Components by name: ``@register(kind, name)`` adds one, ``lookup(kind, name)`` finds it.

What YAML may set are a component's keyword-only arguments; what the code injects stands before the
``*``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from annexe.errors import UserError, unknown_name_error

Component = TypeVar("Component", bound=Callable[..., Any])

_COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(kind: str, name: str) -> Callable[[Component], Component]:
    """Register a class or function as component ``name`` of ``kind``.

    Raises:
        ValueError: if the name is taken.
    """

    def add(component: Component) -> Component:
        registered = _COMPONENTS.setdefault(kind, {}).setdefault(name, component)
        if registered is not component:
            raise ValueError(f"{kind} '{name}' is registered twice: {registered} and {component}")
        return component

    return add


def lookup(kind: str, name: object, where: str) -> Callable[..., Any]:
    """The component ``name`` of ``kind``.

    Args:
        where: the setting that names it, for the message.

    Raises:
        UserError: if there is no such component, with the names there are.
    """
    components = _COMPONENTS.get(kind, {})
    if name not in components:
        raise unknown_name_error(where, name, components)
    return components[str(name)]


def import_plugins(modules: list[str]) -> None:
    """Import modules that register components of their own.

    Raises:
        UserError: for a module that cannot be found or imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"imports: {error}; install it or put its folder on PYTHONPATH"
            ) from None
        except (ImportError, SyntaxError) as error:
            raise UserError(f"imports: module '{module}' is wrong ({error}); fix it") from None
