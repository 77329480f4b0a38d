"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from annexe.errors import UserError

MAX_QUESTION_LENGTH = 2000  # characters; the model's own limit is lower and is checked later
MAX_NAME_LENGTH = 100  # characters
MAX_MESSAGES = 200  # of a chat


@dataclass(frozen=True)
class Limits:
    """Limits of a server, each an option of `annexe serve`.

    Attributes:
        max_body_mb: size of a request, or of a photo that is fetched, in MB.
        max_pixels: width times height of a photo.
        max_questions: questions about a photo in one request.
        queue: requests that wait beside those that the workers have taken.
        timeout: seconds until a request is given up.
    """

    max_body_mb: float = 20.0
    max_pixels: int = 50_000_000
    max_questions: int = 16
    queue: int = 64
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):  # false for what is no number, too
                option = field.name.replace("_", "-")
                raise UserError(f"--{option} is {value}; it must be above 0")

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a request."""
        return int(self.max_body_mb * 1e6)
