"""Data sets: importing this package registers them."""

from annexe.datasets import ego_irgbench  # noqa: F401
