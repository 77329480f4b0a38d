"""The libraries of a server, which are an extra."""

from __future__ import annotations

from importlib import import_module

from annexe.errors import UserError

_MODULES = ("fastapi", "multipart", "prometheus_client", "uvicorn")


def require_extra() -> None:
    """Check that the libraries of a server are installed.

    Raises:
        UserError: naming the extra.
    """
    for name in _MODULES:
        try:
            import_module(name)
        except ImportError:
            raise UserError(
                f'a server needs the library {name}; install it: pip install "annexe[serve]"'
            ) from None
