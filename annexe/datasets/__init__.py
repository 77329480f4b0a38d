"""Data sets: disk -> sample -> batch. Importing this package registers them."""

from __future__ import annotations

from annexe.datasets import ego_irgbench, egohos  # noqa: F401  (they register)
