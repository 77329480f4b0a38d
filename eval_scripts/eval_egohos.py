"""Evaluate a checkpoint on EgoHOS: IoU of hands and touched objects, predictions and a report.

torchrun eval_scripts/eval_egohos.py --cfg-path eval_configs/egohos.yaml --dataset egohos
"""

from __future__ import annotations

if __name__ == "__main__":
    # Here, because the processes that score and draw read this file too, and need nothing of it
    from annexe.cli import run_script
    from annexe.evaluator import evaluate

    run_script(evaluate, __doc__, evaluation=True)
