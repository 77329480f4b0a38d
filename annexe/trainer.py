"""Training: `set_up` makes the parts of a run, `Trainer` runs the loop over them.

A step is two calls away: `train` -> `Trainer.train_step` -> backward.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from annexe.build import (
    build_model,
    build_tokenizer,
    build_training_set,
    build_validation_sets,
    check_start,
    fetch_start,
    filled_config,
)
from annexe.checkpoints.manifest import (
    Changes,
    changes_since,
    describe_changes,
    make_manifest,
    read_manifest,
    with_changes,
)
from annexe.checkpoints.run_folder import (
    Progress,
    find_checkpoint,
    load_progress,
    require_checkpoint,
    saved_config,
)
from annexe.checkpoints.saved_settings import flatten, require_same_meaning
from annexe.checkpoints.start import folder_of_start
from annexe.checkpoints.training_state import (
    frozen_fingerprint,
    load_optimizer,
    load_weights,
    names_of_groups,
    require_same_frozen,
    save_checkpoint,
)
from annexe.config import Config, RunConfig, as_dict, device_settings
from annexe.datasets.collate import Collator
from annexe.datasets.loader import make_loader
from annexe.datasets.mixture import Draw
from annexe.datasets.sampler import MicroBatches
from annexe.datasets.training_set import TrainingSet
from annexe.distributed import (
    SharedGradients,
    distribute,
    from_main,
    make_accelerator,
    require_same_settings,
    require_shared,
    sum_over_ranks,
    trained_parameters,
)
from annexe.errors import UserError
from annexe.evaluation.predict import prompt_collator
from annexe.evaluation.truth import Truth
from annexe.evaluation.validation import Validator
from annexe.files import locked, named
from annexe.models.annexe import Annexe
from annexe.models.compile import compile_blocks, start_compiler
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.models.rollouts import roll_out
from annexe.structures.batch import Batch
from annexe.training import losses
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF, GraphedPass
from annexe.training.feature_cache import stored_patches
from annexe.training.objective import (
    Objective,
    RewardObjective,
    StartWeights,
    SupervisedObjective,
    require_rewardable,
)
from annexe.training.optimizer import build_optimizer, learning_rate
from annexe.training.own_analyses import OwnAnalyses, WithAnalyses
from annexe.training.run_log import LossWindow, RunLogger

log = logging.getLogger(__name__)

_MANY_PARAMETERS_FOR_A_CPU = 20e6  # trained ones


def train(config: Config) -> None:
    """Train what ``config`` describes.

    Raises:
        UserError: while another training has the folder, and for whatever `set_up` refuses.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    with locked(Path(config.run.output_dir)) if is_main else nullcontext():
        trainer = set_up(config)
        announce(trainer)
        trainer.train()


def set_up(config: Config, *, require_start: bool = True) -> Trainer:
    """All parts of a run, resumed where asked. The order of the paragraphs matters.

    Args:
        config: of the run.
        require_start: rewards have to go on from a trained run; measurements do without.

    Raises:
        UserError: for settings, data or a checkpoint that do not go together.
    """
    run = config.run
    output = Path(run.output_dir)

    # What is refused comes before what takes time
    resumed = _checkpoint_to_resume(run, output)
    fetch_start(config.require_model())
    if resumed:
        changes = require_same_meaning(resumed, filled_config(resumed), as_dict(config))
    else:
        changes = {}
        check_start(config.require_model())
    if require_start:
        _require_start_of_rewards(config)

    # Processes and data; nodes have to agree on both, and on what the main process finds
    accelerator = make_accelerator(**device_settings(run))
    require_shared(accelerator, output, "run.output_dir")
    resumed = from_main(accelerator, resumed)
    train_set = build_training_set(config)
    num_images = {"images to train on": len(train_set)}
    require_same_settings(accelerator, flatten(as_dict(config)) | num_images)
    validation_sets = build_validation_sets(config) if run.validate_every else {}
    tokenizer = _prepare_tokenizer(config, train_set, resumed, accelerator)

    # Every rank builds the same model, known again by its frozen weights as they were built,
    # and then draws its own dropout
    if run.compile:
        start_compiler()
    set_seed(run.seed)
    bf16 = accelerator.mixed_precision == "bf16"
    model = build_model(config.require_model(), tokenizer, accelerator.device, bf16=bf16)
    _require_frozen_of_start(config, model, resumed)
    frozen = frozen_fingerprint(model)
    set_seed(run.seed + accelerator.process_index)

    # What rewards may not move far from are the weights of model.init_from
    uses_rewards = run.objective == "rewards"
    start = None
    if uses_rewards:
        require_rewardable(model)
        start = StartWeights(model) if run.rewards.kl_weight else None

    # Weights are loaded by the names that the parameters have before blocks are compiled
    if resumed:
        load_weights(resumed, model)
    if run.compile:
        compile_blocks(model)

    # The encoder runs over all photos while it is still whole on every rank
    if run.store_patches is not None:
        for dataset in train_set.members:
            dataset.stored_patches = stored_patches(
                model.rgb_encoder,
                dataset,
                Path(run.store_patches),
                accelerator,
                settings=config.require_model()["rgb_encoder"],
                batch_size=run.batch_size,
                num_workers=run.num_workers,
            )

    # Sharded parameters are others: the optimizer is made of those, then gets its moments back
    distribute(accelerator, model, model.blocks(), run.parallel)
    optimizer = build_optimizer(model, run)
    names = names_of_groups(model, optimizer)
    progress = Progress()
    if resumed:
        load_optimizer(resumed, optimizer, names, accelerator)
        progress = _load_progress(resumed, run)
        model.calibrated_thresholds = progress.thresholds

    # Batches from where the run stands, in the layout that the model reads fastest
    is_sharded = run.parallel == "fsdp" and accelerator.num_processes > 1
    is_whole_on_gpu = accelerator.device.type == "cuda" and not is_sharded
    can_use_graphs = is_whole_on_gpu and model.language_model.supports_cuda_graphs
    use_graphs = run.cuda_graphs and can_use_graphs
    model.text_decoder.graphs = use_graphs
    use_graphs = use_graphs and not uses_rewards  # what is drawn has a new shape in every step
    collate = Collator(
        tokenizer,
        model.num_image_tokens,
        model.pixel_decoder.num_slots,
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF if use_graphs else 1,
        unpad=model.language_model.skips_masked_tiles,
        max_positions=model.language_model.max_positions,
        num_image_positions=model.num_image_positions,
        answers_read=model.answers_read,
        responses=not uses_rewards,
        num_generated=run.max_new_tokens if uses_rewards else 0,
        keep_samples=uses_rewards,
    )
    batches: Callable[[Progress], Iterable[Batch]] = partial(
        _training_batches, train_set=train_set, collate=collate, run=run, accelerator=accelerator
    )
    if run.own_analyses:
        own_analyses = _own_analyses(model, train_set, run, accelerator)
        batches = partial(
            _batches_by_pass,
            own_analyses=own_analyses,
            train_set=train_set,
            collate=collate,
            run=run,
            accelerator=accelerator,
        )

    # What a step trains on
    objective: Objective = SupervisedObjective(
        run.loss_weights,
        image_token_head=model.image_token_head,
        has_depth=model.predicts_depth,
    )
    if uses_rewards:
        objective = RewardObjective(
            run.rewards,
            objective.weights,
            model=model,
            roll_out=partial(
                roll_out,
                model,
                num_members=run.rewards.group_size,
                max_new_tokens=run.max_new_tokens,
                temperature=run.rewards.temperature,
            ),
            collate=collate,
            accelerator=accelerator,
            seed=run.seed,
            start=start,
        )

    # What is written and scored on the way
    manifest = {}
    if accelerator.is_main_process:
        manifest = _make_manifest(train_set.fingerprint(), resumed, progress.step, changes)
    logger = RunLogger(config, output, progress, enabled=accelerator.is_main_process)
    validator = None
    if validation_sets:
        validator = Validator(
            {name: Truth(dataset) for name, dataset in validation_sets.items()},
            accelerator,
            num_images=run.validation_images,
            batch_size=run.batch_size,
            max_new_tokens=run.max_new_tokens,
            num_workers=run.num_workers,
        )
    save = partial(
        save_checkpoint,
        output,
        model,
        optimizer,
        names,
        config=as_dict(config),
        frozen=frozen,
        manifest=manifest,
        accelerator=accelerator,
        keep=run.keep_checkpoints,
    )
    return Trainer(
        run,
        accelerator=accelerator,
        model=model,
        objective=objective,
        optimizer=optimizer,
        batches=batches,
        train_set=train_set,
        manifest=manifest,
        progress=progress,
        validator=validator,
        logger=logger,
        save=save,
        use_cuda_graphs=use_graphs,
    )


def _checkpoint_to_resume(run: RunConfig, output: Path) -> Path | None:
    """The checkpoint that ``run.resume`` means, if it means one.

    Raises:
        UserError: if going on from it would lose or mix up what is there.
    """
    latest = find_checkpoint(output)
    if run.resume is None or run.resume == "":
        if latest:
            raise UserError(
                f"run.output_dir '{output}' holds a run already; set run.resume=auto to go on "
                "with it, or choose another folder"
            )
        return None
    resumed = latest if run.resume == "auto" else require_checkpoint(run.resume, "latest")
    if resumed is None:
        return None
    if latest and latest.resolve() != resumed.resolve():
        raise UserError(
            f"run.resume '{resumed}' is not the last checkpoint of run.output_dir '{output}', "
            f"which is '{latest.name}': what came after would be lost. Choose another "
            "run.output_dir"
        )
    if load_progress(resumed).step > run.max_steps:
        raise UserError(f"'{resumed}' is past run.max_steps {run.max_steps}; raise it to go on")

    return resumed


def _require_start_of_rewards(config: Config) -> None:
    """Check that rewards have a trained run to go on from.

    Raises:
        UserError: if they do not; a model that says nothing yet gets no reward to learn from.
    """
    start = config.require_model().get("init_from")
    if config.run.objective == "rewards" and (start is None or not folder_of_start(Path(start))):
        raise UserError(
            "run.objective=rewards goes on from a trained run; set model.init_from to the folder "
            "of one, as train_configs/rewards.yaml does"
        )


def _make_manifest(
    fingerprint: str, resumed: Path | None, step: int, changes: Changes
) -> dict[str, Any]:
    """The manifest of a run; what changed since the checkpoint it goes on from is told and kept.

    Args:
        fingerprint: a hash of the data.
        resumed: the checkpoint, if there is one.
        step: where it stands.
        changes: settings that differ from its own.
    """
    if resumed is None:
        return make_manifest(fingerprint, [])
    saved = read_manifest(resumed)
    changes = changes | changes_since(saved, fingerprint)
    if changes:
        log.warning("'%s' goes on with changes: %s", resumed, describe_changes(changes))
    return make_manifest(fingerprint, with_changes(saved, step, changes))


def _load_progress(resumed: Path, run: RunConfig) -> Progress:
    """Where training stood; a best score of another metric is of another scale, and dropped."""
    progress = load_progress(resumed)
    if saved_config(resumed)["run"]["validation_metric"] != run.validation_metric:
        progress.best_score = None
        progress.best_step = None
    return progress


def _prepare_tokenizer(
    config: Config, train_set: TrainingSet, resumed: Path | None, accelerator: Accelerator
) -> TextTokenizer:
    """The tokenizer of the Llama or of the run to start from, or one trained on the run's text."""
    model = config.require_model()
    llama = model["language_model"].get("path")
    start = model.get("init_from")
    earlier = resumed
    if earlier is None and start and not llama:
        earlier = folder_of_start(Path(start))

    # Training one is the main process's work
    if earlier:
        folder = earlier / "tokenizer"
    elif llama:
        folder = Path(llama)
    else:
        folder = Path(config.run.output_dir) / "tokenizer"
        if accelerator.is_main_process:
            num_slots = model["pixel_decoder"]["num_slots"]
            with named(folder):
                train_tokenizer(train_set.texts(), num_slots).save(folder)
    accelerator.wait_for_everyone()
    return build_tokenizer(config, folder)


def _require_frozen_of_start(config: Config, model: Annexe, resumed: Path | None) -> None:
    """Check that what was frozen in the run to start from is the same here, before training.

    Raises:
        UserError: if it is not; what was trained on top of it would then mean nothing.
    """
    start = config.require_model().get("init_from")
    folder = folder_of_start(Path(start)) if start and not resumed else None
    if folder is not None and (folder / "frozen.json").is_file():
        require_same_frozen(folder, model, starts=True)


def _own_analyses(
    model: Annexe, train_set: TrainingSet, run: RunConfig, accelerator: Accelerator
) -> OwnAnalyses:
    """What has the model generate analyses of training photos.

    Raises:
        UserError: for a model whose questions read none.
    """
    if model.answers_read.source != "analysis":
        raise UserError(
            f"run.own_analyses is {run.own_analyses}, and questions read no analysis "
            f"(model.answers_read is {model.answers_read.source}); set model.answers_read=analysis"
        )

    # In evaluation mode, and back
    def analyze(batch: Batch) -> list[str]:
        training = model.training
        model.eval()
        images = model.generate(batch, run.max_new_tokens)
        model.text_decoder.release()
        model.train(training)
        return [image.analysis for image in images]

    return OwnAnalyses(
        train_set,
        prompt_collator(model, run.max_new_tokens),
        analyze,
        share=run.own_analyses,
        first_pass=run.own_analyses_from,
        folder=Path(run.output_dir) / "own_analyses",
        accelerator=accelerator,
        seed=run.seed,
        batch_size=run.batch_size,
        num_workers=run.num_workers,
    )


def training_loader(
    train_set: TrainingSet | WithAnalyses,
    batches: Iterable[list[Draw]],
    collate: Collator,
    num_workers: int,
    device: torch.device,
) -> DataLoader:
    """One rank's micro-batches, made by ``num_workers`` processes."""
    return make_loader(train_set, batches, collate, num_workers=num_workers, device=device)


def _training_batches(
    progress: Progress,
    *,
    train_set: TrainingSet | WithAnalyses,
    collate: Collator,
    run: RunConfig,
    accelerator: Accelerator,
    last_step: int | None = None,
) -> DataLoader:
    """One rank's micro-batches from where ``progress`` stands to the last step, or to another."""
    num_steps = (last_step or run.max_steps) - progress.step
    sampler = MicroBatches(
        train_set.mixture,
        batch_size=run.batch_size,
        num_batches=num_steps * run.gradient_accumulation,
        first_image=progress.images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        batches_per_step=run.gradient_accumulation,
        num_queries=train_set.num_queries if run.balance_processes else None,
    )
    return training_loader(train_set, sampler, collate, run.num_workers, accelerator.device)


def _batches_by_pass(
    progress: Progress,
    *,
    own_analyses: OwnAnalyses,
    train_set: TrainingSet,
    collate: Collator,
    run: RunConfig,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """As `_training_batches`, with analyses that the model generates before each pass.

    A pass begins with the first step whose first image belongs to it.
    """
    images_per_step = run.batch_size * run.gradient_accumulation * accelerator.num_processes
    size = len(train_set)
    start = replace(progress)
    while start.step < run.max_steps:
        # Steps to the end of the pass
        number = start.images // size
        num_left = (number + 1) * size - start.images
        last_step = min(start.step - (-num_left // images_per_step), run.max_steps)

        yield from _training_batches(
            start,
            train_set=own_analyses.samples_of_pass(number),
            collate=collate,
            run=run,
            accelerator=accelerator,
            last_step=last_step,
        )
        start.images += (last_step - start.step) * images_per_step
        start.step = last_step


class Trainer:
    """One training run: steps to ``run.max_steps``, with log, validation and checkpoints.

    Args:
        run: the run's settings.
        accelerator: device, processes and precision.
        model: what is trained, spread over several GPUs where it is to be.
        objective: what a step trains on.
        optimizer: over the model's trained parameters.
        batches: this rank's micro-batches from a `Progress` on.
        train_set: the data that the batches are of.
        manifest: versions, a hash of the data, and what changed where the run was resumed.
        progress: where the run stands; counted on as it trains.
        validator: scores the model on val, if it is to be.
        logger: writes log lines, the progress bar and the manifest.
        save: writes a checkpoint and returns its size in bytes.
        use_cuda_graphs: a pass is one CUDA graph for each shape of batch.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        accelerator: Accelerator,
        model: Annexe,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[Progress], Iterable[Batch]],
        train_set: TrainingSet,
        manifest: dict[str, Any],
        progress: Progress,
        validator: Validator | None,
        logger: RunLogger,
        save: Callable[..., int],
        use_cuda_graphs: bool,
    ) -> None:
        self.run = run
        self.accelerator = accelerator
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.batches = batches
        self.train_set = train_set
        self.manifest = manifest
        self.progress = progress
        self.validator = validator
        self.logger = logger
        self.save_checkpoint = save
        self.output = Path(run.output_dir)

        # Loss terms in use and their weights
        device = accelerator.device
        self.loss_weights = objective.weights
        self.term_weights = torch.tensor(list(self.loss_weights.values()), device=device)

        # Data sets whose losses are summed apart, too
        self.num_apart = len(train_set.names) if train_set.is_mixed else 0

        # Images, queries and tokens trained on that are not in `progress` yet
        self.seen = torch.zeros(3, dtype=torch.float64, device=device)

        # Several processes: FSDP averages gradients over ranks, our own exchange sums them
        is_sharded = run.parallel == "fsdp" and accelerator.num_processes > 1
        self.loss_scale = accelerator.num_processes if is_sharded else 1
        self.shared_gradients: SharedGradients | None = None
        if accelerator.num_processes > 1 and not is_sharded:
            self.shared_gradients = SharedGradients(trained_parameters(model))

        self.uses_cuda_graphs = use_cuda_graphs
        self.run_pass: Callable[[Batch, Tensor], Tensor] = self._forward_backward
        if use_cuda_graphs:
            trained = trained_parameters(model)
            self.run_pass = GraphedPass(self._forward_backward, trained, device)

    def train(self) -> None:
        """Run every step that is left, with validation and checkpoints on the way."""
        run = self.run
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what making the model took does not count
        window = self._new_window()
        batches = iter(self.batches(self.progress))
        with self.logger.bar(self.progress.step, run.max_steps) as advance:
            while self.progress.step < run.max_steps:
                micro_batches = [next(batches) for _ in range(run.gradient_accumulation)]
                window.add(*self.train_step(micro_batches))
                step = self.progress.step
                advance(step)

                # What is due after this step
                is_last = step == run.max_steps
                logs = is_last or step % run.log_every == 0
                validates = bool(self.validator) and (is_last or step % run.validate_every == 0)
                saves = is_last or validates or step % run.checkpoint_every == 0
                if logs or saves:
                    window.require_finite(step, self.output / "checkpoints")
                if logs:
                    self._log(window)
                    window = self._new_window()
                if validates:
                    self.validate()
                if saves:
                    self.save()
        self.logger.close()

    def train_step(self, batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """One step over this rank's micro-batches.

        Every term is normalized by its units over all ranks and micro-batches.

        Returns:
            Each term's total on this rank, its units over all ranks, and the gradient norm, all on
            the device. Totals and units are those of `losses.totals` and `losses.counts`.
        """
        names = list(self.loss_weights)
        device = self.accelerator.device

        # Units are counted on the CPU, where nothing has to wait, then summed over ranks
        batches = self.objective.prepare(batches, self.progress.step)
        units = losses.counts(batches, names, self.num_apart, self.objective.terms)
        counts = torch.cat([units.flatten(), count_samples(batches)])
        counts = sum_over_ranks(self.accelerator, counts.to(device, non_blocking=True))
        units = counts[:-3].view(units.shape)
        factor = self.term_weights / units[0].clamp(min=1)

        # Forward and backward; gradients of whole models are exchanged behind the last micro-batch
        self.model.train()
        if not self.uses_cuda_graphs:
            batches = [batch.to(device) for batch in batches]
        for _ in range(self.objective.num_updates):
            totals = torch.zeros(units.shape, device=device)
            for batch in batches:
                totals += self.run_pass(batch, factor)
            if self.shared_gradients is not None:
                self.shared_gradients.sum_over_ranks()
            norm = self._move_weights()
        self.progress.step += 1
        self.seen += counts[-3:]
        return totals, units, norm

    def _move_weights(self) -> Tensor:
        """The optimizer's step at this step's learning rate; gives the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.run)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.run.clip_norm)
        self.optimizer.step()
        keeps_gradients = self.uses_cuda_graphs or self.shared_gradients is not None
        self.optimizer.zero_grad(set_to_none=not keeps_gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _forward_backward(self, batch: Batch, factor: Tensor) -> Tensor:
        """Forward and backward over one micro-batch; the loss is ``factor`` times the totals.

        Returns:
            The total of each term, of all data sets and of each, as `losses.totals` gives them.
        """
        names = list(self.loss_weights)
        terms = self.objective.terms
        term_totals = losses.totals(self.model(batch), batch, names, self.num_apart, terms)
        self.accelerator.backward((factor * term_totals[0]).sum() * self.loss_scale)
        return term_totals.detach()

    def validate(self) -> None:
        """Score the real metrics on the first validation images and remember the best step."""
        assert self.validator is not None
        metrics, thresholds, num_images = self.validator(self.model)
        self.progress.thresholds = thresholds
        self.model.calibrated_thresholds = thresholds

        # A metric is absent where there was nothing to measure
        metric = self.run.validation_metric
        score = metrics.get(metric, 0.0)
        if self.progress.best_score is None or score >= self.progress.best_score:
            self.progress.best_score = score
            self.progress.best_step = self.progress.step
        self.logger.write({"kind": "validation", "step": self.progress.step, **metrics})
        log.info("step %d: %s %.3f on %d images", self.progress.step, metric, score, num_images)

    def save(self) -> None:
        """Write a checkpoint; every validated step is written, so the best one is there."""
        started = time.perf_counter()
        self._read_counters()
        size = self.save_checkpoint(progress=self.progress)
        self.logger.write_manifest(self.progress, self.manifest)
        seconds = time.perf_counter() - started
        step = self.progress.step
        log.info("step %d: checkpoint of %.2f GB written in %.1f s", step, size / 1e9, seconds)

    def _new_window(self) -> LossWindow:
        return LossWindow(list(self.loss_weights), self.num_apart, self.accelerator.device)

    def _read_counters(self) -> None:
        """Bring what the device counted since the last call into the progress."""
        images, queries, tokens = self.seen.tolist()
        self.seen.zero_()
        self.progress.images += int(images)
        self.progress.queries += int(queries)
        self.progress.tokens += int(tokens)

    def _log(self, window: LossWindow) -> None:
        """Write the means of a window of steps."""
        self._read_counters()
        terms, *by_dataset = window.means(sum_over_ranks(self.accelerator, window.totals))
        record = {
            "kind": "train",
            "step": self.progress.step,
            "epoch": self.progress.images / len(self.train_set),
            "images": self.progress.images,
            "queries": self.progress.queries,
            "tokens": self.progress.tokens,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": sum(self.loss_weights[name] * value for name, value in terms.items()),
        }
        for name, value in terms.items():
            record[f"loss/{name}"] = value
        if by_dataset:
            record |= self._record_by_dataset(by_dataset)
        record |= self.objective.record()
        record["gradient_norm"] = float(window.norm)
        if self.accelerator.device.type == "cuda":
            # The most that tensors took on this rank's GPU since training began, in GB (1e9 bytes)
            record["gpu_memory"] = torch.cuda.max_memory_allocated() / 1e9
        self.logger.write(record)

    def _record_by_dataset(self, by_dataset: list[dict[str, float]]) -> dict[str, float]:
        """Images, epochs and mean losses of each of several data sets, for a log line."""
        record: dict[str, float] = {}
        mixture = self.train_set.mixture
        counts = mixture.counts(self.progress.images)
        for index, name in enumerate(self.train_set.names):
            record[f"images/{name}"] = counts[index]
            record[f"epoch/{name}"] = counts[index] / mixture.sizes[index]
            for term, value in by_dataset[index].items():
                record[f"losses/{name}/{term}"] = value
        return record


def count_samples(batches: list[Batch]) -> Tensor:
    """Images, queries and tokens of some batches, float64[3]."""
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        counts[0] += len(batch.images)
        counts[1] += batch.query_mask.sum()
        counts[2] += (batch.text.segment_ids >= 0).sum()
    return counts


def announce(trainer: Trainer) -> None:
    """Say what is trained on what, and which settings do not take effect."""
    run = trainer.run

    # How much is trained, on what
    parameters = list(trainer.model.parameters())
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    num_parameters = 0
    for parameter in parameters:
        per_byte = 2 if parameter.dtype == torch.uint8 else 1  # NF4 holds two in a byte
        num_parameters += per_byte * parameter.numel()
    log.info(
        "step %d of %d: %.1f M parameters, %.1f M of them trained, on %d images with up to %d "
        "queries each, %d process(es) on %s, under '%s'",
        trainer.progress.step,
        run.max_steps,
        num_parameters / 1e6,
        num_trained / 1e6,
        len(trainer.train_set),
        trainer.train_set.queries_per_image,
        trainer.accelerator.num_processes,
        trainer.accelerator.device,
        trainer.output,
    )

    if trainer.train_set.is_mixed:
        log.info("data sets: %s", trainer.train_set.describe())

    # Settings that will not do what they promise
    if trainer.accelerator.device.type == "cpu" and num_trained > _MANY_PARAMETERS_FOR_A_CPU:
        log.warning(
            "no GPU is in use: with %.0f M trained parameters a step can take minutes on a CPU; "
            "train_configs/annexe_tiny.yaml is made for one",
            num_trained / 1e6,
        )
    if run.cuda_graphs and not trainer.model.text_decoder.graphs:
        log.warning(
            "run.cuda_graphs is for GPUs, without fsdp and without an int8 base; it is ignored here"
        )
    num_slots = trainer.model.pixel_decoder.num_slots
    if trainer.train_set.num_slots > num_slots:
        log.warning(
            "annotations use up to %d slots, model.pixel_decoder.num_slots is %d: the model trains "
            "on the first ones, the metrics count all",
            trainer.train_set.num_slots,
            num_slots,
        )
