"""How this run folder was made: by annexe 0.1.0 with transformers 5.17.0, timm 1.0.31, peft 0.21.2.

It has what a user of that version has on disk: tensors by the libraries' names, moments of the
optimizer by position, and settings by their old names. ``moments.json`` holds the norm of every
moment by the name of its parameter, read from the optimizer of that version.

It cannot run with later versions. It was called with config.yaml, in a folder with drawn scenes
under ``data``; the folder of the tokenizer beside the checkpoints was left out.
"""

import json
import sys
from pathlib import Path

import torch

from annexe.config import load_config
from annexe.models.depth_branch import SIZES, Size
from annexe.trainer import Trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    SIZES["smallest"] = Size(8, 4, 2, (1, 2, 3, 4), (4, 4, 8, 8), 4, 4)
    Trainer(load_config(sys.argv[1])).train()
    trainer = Trainer(load_config(sys.argv[1], ["run.resume=auto"]))
    norms = {}
    for name, parameter in trainer.model.named_parameters():
        moments = trainer.optimizer.state.get(parameter, {})
        norms[name] = {key: float(v.double().norm()) for key, v in moments.items() if v.ndim}
    Path("moments.json").write_text(json.dumps(norms, indent=1))
