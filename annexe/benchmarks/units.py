"""Units that the records of all measurements share."""

from __future__ import annotations

from typing import Any

GB = 1e9  # bytes
TERA = 1e12  # operations

Record = dict[str, Any]  # plain nested dicts of numbers, to be written as JSON; units are in names
