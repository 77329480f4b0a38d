"""Where a part's weights come from."""

from __future__ import annotations

from annexe.errors import unknown


def require_random(part: str, init: str) -> None:
    """Check that YAML declares a part's weights random: nothing stays random by oversight.

    Raises:
        UserError: for anything but ``random``, the only start there is without an importer.
    """
    if init != "random":
        raise unknown(f"setting model.{part}.init", init, ("random",))
