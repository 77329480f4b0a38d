"""Evaluate a checkpoint on Ego-IRGBench: text and mask metrics, predictions and a report.

torchrun eval_scripts/eval_egoirgbench.py --cfg-path eval_configs/annexe_tiny.yaml
    --dataset ego_irgbench
"""

from __future__ import annotations

if __name__ == "__main__":
    # Here, because the processes that score and draw read this file too, and need nothing of it
    from annexe.cli import run_script
    from annexe.evaluator import evaluate

    run_script(evaluate, __doc__, evaluation=True)
