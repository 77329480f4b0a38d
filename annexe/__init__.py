"""annexe: analyse, answer and ground hand-object interactions in first-person photos."""

__version__ = "0.1.0"
