"""annexe: analyse, answer and ground hand-object interactions in first-person photos."""

import logging

__version__ = "0.1.0"

# peft imports it where it is installed, and then it tells what kernels it lacks, and of every cast of its input.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
