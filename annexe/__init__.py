"""annexe: analyse, answer and ground hand-object interactions in first-person photos."""

import logging

__version__ = "0.2.0"

# peft imports it where it is installed. Then it logs which kernels it lacks, and every cast of its
# input
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
