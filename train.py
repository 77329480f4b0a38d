"""Train ANNEXE.

torchrun train.py --cfg-path train_configs/annexe_tiny.yaml [--options run.batch_size=2 ...]
"""

from __future__ import annotations

from annexe.cli import run_script
from annexe.trainer import train

if __name__ == "__main__":
    run_script(train, __doc__)
