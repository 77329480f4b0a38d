"""Every setting of a run, with its default; `annexe.settings` reads them.

Three blocks: ``model`` and ``datasets`` name registered components (`annexe.registry`), ``run`` is
`RunConfig`. Components are checked in `annexe.build`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from annexe.errors import UserError, unknown_name_error
from annexe.settings import Block, PathSetting


@dataclass
class LossWeights:
    """Weight of each loss term.

    Those of ``analysis`` to ``mask`` are the released ones. Dice, which the released recipe does
    not have, stands beside the cross entropy of masks as in Mask2Former (CVPR 2022).
    """

    analysis: float = 1.0
    answer: float = 1.0
    depth: float = 0.5
    presence: float = 1.0
    mask: float = 3.0
    dice: float = 3.0
    focal: float = 0.0
    hard_pixel: float = 0.0
    image_token_labels: float = 0.0


@dataclass
class RewardWeights:
    """Weight of each part of the reward; what they measure is in `annexe.training.rewards`."""

    # Of an answer
    answer_equal: float = 1.0
    answer_f1: float = 0.5
    refusal: float = 0.5
    targets: float = 1.0
    consistency: float = 0.5

    # Of an analysis
    analysis_equal: float = 0.5
    analysis_f1: float = 0.5
    analysis_slots: float = 1.0

    # Of both
    format: float = 0.25

    # Of the presence that is drawn of a query's slots
    presence_iou: float = 1.0
    presence_refusal: float = 1.0


@dataclass
class RewardConfig:
    """Training on rewards (``run.objective: rewards``), by GRPO with the clip of DAPO."""

    # Responses that are drawn to each prompt, and how freely
    group_size: int = 8
    temperature: float = 1.0

    # How far a step may move: optimizer steps on what was drawn, and the clip of each
    updates: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.28
    scale_advantages: bool = True  # by the spread of each group

    # Of the loss: words, presence, and of each the divergence from the start of the run
    word_weight: float = 1.0
    presence_weight: float = 1.0
    kl_weight: float = 0.01  # 0 keeps no copy of what is trained

    weights: RewardWeights = field(default_factory=RewardWeights)

    def __post_init__(self) -> None:
        # Numbers out of range
        where = "run.rewards"
        if self.group_size < 2:
            raise UserError(
                f"{where}.group_size is {self.group_size}; it must be at least 2, for a response "
                "is compared with the others of its group"
            )
        if self.updates < 1:
            raise UserError(f"{where}.updates is {self.updates}; it must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"{where}.temperature is {self.temperature}; it must be above 0")
        if not 0 < self.clip_low < 1:
            raise UserError(f"{where}.clip_low is {self.clip_low}; it must be between 0 and 1")
        if not self.clip_high > 0:
            raise UserError(f"{where}.clip_high is {self.clip_high}; it must be above 0")

        # Weights
        named = {name: getattr(self, name) for name in _WEIGHTS_OF_REWARDS}
        named |= {f"weights.{name}": weight for name, weight in vars(self.weights).items()}
        for name, weight in named.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"{where}.{name} is {weight}; it must be a number from 0 on")
        if not any(vars(self.weights).values()):
            raise UserError(f"{where}.weights are all 0; there is nothing to reward")
        if not self.word_weight and not self.presence_weight:
            raise UserError(
                f"{where}.word_weight and presence_weight are 0; raise one, or set "
                "run.objective=supervised"
            )


@dataclass
class WandbConfig:
    """Weights & Biases logging; offline mode needs no account."""

    enabled: bool = False
    project: str = "annexe"
    name: str | None = None
    mode: str = "online"

    def __post_init__(self) -> None:
        _require_choice("run.wandb.mode", self.mode, ("online", "offline", "disabled"))


# Metrics that can pick the best checkpoint: more is better.
VALIDATION_METRICS = (
    "analysis/cider",
    "answer/cider",
    "answer/exact_match",
    "answer/exact_match_targets",
    "grounding/ciou",
    "grounding/giou",
    "grounding/miou",
    "grounding/n_acc",
    "grounding/t_acc",
    "grounding/precision@0.5",
    "grounding/precision@0.6",
    "grounding/precision@0.7",
    "grounding/precision@0.8",
    "grounding/precision@0.9",
    "presence/accuracy",
    "depth/delta1",
)

# Settings of a run by what their values have to be
_CHOICES = {
    "objective": ("supervised", "rewards"),
    "device": ("auto", "cpu", "cuda"),
    "mixed_precision": ("auto", "fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "generation_dtype": ("auto", "float8"),
    "optimizer": ("adamw", "muon"),
    "learning_rate_decay": ("cosine", "linear"),
    "analysis": ("generated", "true"),
}
_NOT_NEGATIVE = (
    "seed",
    "num_workers",
    "warmup_steps",
    "validate_every",
    "own_analyses_from",
    "draft_tokens",
)
_AT_LEAST_ONE = (
    "muon_period",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "log_every",
    "validation_images",
    "checkpoint_every",
    "keep_checkpoints",
    "max_new_tokens",
)
_WEIGHTS_OF_REWARDS = ("word_weight", "presence_weight", "kl_weight")
_FINITE = ("learning_rate", "min_learning_rate", "warmup_learning_rate", "weight_decay")


@dataclass
class RunConfig:
    """Training and evaluation settings; everything is written under ``output_dir``."""

    output_dir: PathSetting = "runs/annexe"
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    mixed_precision: str = "auto"  # auto, fp32 or bf16

    # torch.compile of every block: slow to start, then faster steps
    compile: bool = False
    # On a GPU, not with fsdp: a pass, or a step of generation, as one CUDA graph a shape of batch
    cuda_graphs: bool = False

    # Several GPUs (torchrun): the whole model on each (ddp), or its weights spread over all (fsdp)
    parallel: str = "ddp"
    # Processes share the photos of a step by their questions, so that they take equally long
    balance_processes: bool = False
    timeout_minutes: float = 15

    # Schedule: optimizer steps; one epoch is one pass over the training images
    max_steps: int = 1000
    batch_size: int = 4  # images of one process and micro-batch
    gradient_accumulation: int = 1
    optimizer: str = "adamw"  # muon: for training from scratch, fewer steps; not with fsdp
    muon_period: int = 1  # Muon's weights move every so many steps, by that many steps at once
    learning_rate: float = 1e-5
    learning_rate_decay: str = "cosine"  # or linear; from learning_rate to min_learning_rate
    min_learning_rate: float = 1e-6
    warmup_learning_rate: float = 1e-6
    warmup_steps: int = 1000
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float = 1.0
    loss_weights: LossWeights = field(default_factory=LossWeights)

    # What is trained on: the true answers, or rewards of drawn ones, from a trained run on
    objective: str = "supervised"
    rewards: RewardConfig = field(default_factory=RewardConfig)

    # With model.answers_read=analysis: the share of training photos whose questions read what the
    # model itself says of them, and the pass over the data, counted from 0, that begins with it
    own_analyses: float = 0.0
    own_analyses_from: int = 1

    # Loading
    num_workers: int = 4
    store_patches: PathSetting | None = None  # folder: a frozen RGB encoder runs once a photo

    # Logging, validation and checkpoints, in optimizer steps
    log_every: int = 20
    validate_every: int = 500  # 0: never
    validation_images: int = 64
    validation_metric: str = "grounding/ciou"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: PathSetting | None = None  # auto, or a run folder or checkpoint
    wandb: WandbConfig = field(default_factory=WandbConfig)

    # Evaluation
    checkpoint: PathSetting | None = None
    split: str = "test"
    queries_per_annotation: int | str = 1  # or all
    analysis: str = "generated"  # what answers read with model.answers_read=analysis; or true
    max_new_tokens: int = 50
    # Weights that decoding reads: auto, those of the language model; float8, rounded copies of them
    generation_dtype: str = "auto"
    draft_tokens: int = 4  # drafted and verified at once; 0 = none
    report: bool = True  # draw report.html after an evaluation

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require_choice(f"run.{name}", getattr(self, name), choices)
        if self.validation_metric not in VALIDATION_METRICS:
            raise unknown_name_error(
                "run.validation_metric", self.validation_metric, VALIDATION_METRICS
            )
        if str(self.resume).lower() in ("on", "true", "yes"):
            raise UserError(
                f"run.resume is '{self.resume}'; set it to auto, or to a run folder or checkpoint"
            )
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        """Refuse numbers out of range."""
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(f"run.{name} is {getattr(self, name)}; it cannot be negative")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UserError(f"run.{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed >= 2**32:
            raise UserError(f"run.seed is {self.seed}; it must be below {2**32}")
        if not 0 < self.timeout_minutes < math.inf:
            raise UserError(f"run.timeout_minutes is {self.timeout_minutes}; it must be above 0")
        if not self.clip_norm > 0:
            raise UserError(
                f"run.clip_norm is {self.clip_norm}; it must be above 0 (.inf clips nothing)"
            )

        if not 0 <= self.own_analyses <= 1:
            raise UserError(f"run.own_analyses is {self.own_analyses}; it is a share, from 0 to 1")

        # Rates and weights
        values = {name: getattr(self, name) for name in _FINITE}
        for name, weight in vars(self.loss_weights).items():
            values[f"loss_weights.{name}"] = weight
        for name, value in values.items():
            if not 0 <= value < math.inf:
                raise UserError(f"run.{name} is {value}; it must be a number from 0 on")

        # Numbers with a form of their own
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"run.betas is {self.betas}; AdamW takes two numbers from 0 to 1, "
                "such as [0.9, 0.999]"
            )
        queries = self.queries_per_annotation
        if queries != "all" and (not isinstance(queries, int) or queries < 1):
            raise UserError(
                f"run.queries_per_annotation is {queries!r}; set it to all, or to a number "
                "from 1 on"
            )

    def _check_combinations(self) -> None:
        """Refuse settings that do not go together."""
        # Nothing to train
        if not any(vars(self.loss_weights).values()):
            raise UserError("run.loss_weights are all 0; there is nothing to train")
        if self.warmup_steps > self.max_steps:
            raise UserError(
                f"run.warmup_steps ({self.warmup_steps}) is larger than run.max_steps "
                f"({self.max_steps}); set run.warmup_steps to {self.max_steps} at most"
            )

        # What rewards exclude
        if self.own_analyses and self.objective == "rewards":
            raise UserError(
                "run.own_analyses is for true answers, and with run.objective=rewards all that "
                "questions read is drawn; set run.own_analyses=0"
            )
        if self.objective == "rewards" and self.parallel == "fsdp":
            raise UserError(
                "run.objective=rewards needs weights whole; set run.parallel=ddp, which with "
                "adapters takes little more memory"
            )

        # What sharded weights exclude
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise UserError(
                "run.optimizer=muon needs matrices whole; set run.parallel=ddp, "
                "or run.optimizer=adamw"
            )


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise UserError(f"{name} is '{value}'; choose {listed}")


@dataclass
class Config:
    """A whole YAML file."""

    model: Block | None = None
    datasets: Block = field(default_factory=dict)
    run: RunConfig = field(default_factory=RunConfig)
    imports: list[str] = field(default_factory=list)

    def require_model(self) -> dict[str, Any]:
        """The ``model`` block itself, not a copy.

        Raises:
            UserError: if there is none.
        """
        if self.model is None:
            raise UserError(
                "the configuration has no model block; take one from train_configs/, "
                "such as annexe_tiny.yaml"
            )
        return self.model


PARTS = ("rgb_encoder", "depth_branch", "projector", "language_model", "pixel_decoder")
OPTIONAL_PARTS = {"projector": "concat"}  # with the type of one that is left out


def is_released(config: DictConfig | ListConfig) -> bool:
    """Whether a YAML file is one of the released ANNEXE code."""
    if not isinstance(config, DictConfig):
        return False
    if "evaluation_datasets" in config:
        return True
    for block, key in (("model", "arch"), ("datasets", "egoirgbench")):
        if isinstance(config.get(block), DictConfig) and key in config[block]:
            return True
    return False


def device_settings(run: RunConfig) -> dict[str, Any]:
    """The settings that `annexe.distributed.make_accelerator` takes."""
    return {
        "device": run.device,
        "mixed_precision": run.mixed_precision,
        "timeout_minutes": run.timeout_minutes,
    }


def as_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain containers, to be saved with a run."""
    return asdict(config)


def to_plain(block: Any) -> dict[str, Any]:
    """A block of OmegaConf's as plain containers."""
    settings = OmegaConf.to_container(block)
    assert isinstance(settings, dict)
    return cast("dict[str, Any]", settings)
