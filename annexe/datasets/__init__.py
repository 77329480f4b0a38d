"""Data sets: from disk to a batch. Importing this package registers them."""

from annexe.datasets import ego_irgbench, egohos  # noqa: F401
