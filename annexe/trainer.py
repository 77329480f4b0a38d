"""Training: set-up, the step, validation, checkpoints, log."""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from annexe.build import build_dataset, build_model, build_tokenizer
from annexe.checkpoints.run_folder import (
    Progress,
    find_checkpoint,
    load_progress,
    require_checkpoint,
    saved_config,
)
from annexe.checkpoints.training_state import (
    frozen_fingerprint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from annexe.config import Config, RunConfig, as_dict, device_settings
from annexe.datasets.collate import Collator
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.sampler import MicroBatches
from annexe.distributed import distribute, gather_lists, make_accelerator, sum_over_ranks
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches, predict
from annexe.evaluation.scoring import calibrate_thresholds, score
from annexe.evaluation.truth import Truth
from annexe.files import locked
from annexe.models.compile import compile_blocks
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.structures.batch import Batch
from annexe.training import losses
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF, GraphedPass
from annexe.training.feature_cache import stored_patches
from annexe.training.optimizer import build_optimizer, learning_rate
from annexe.training.run_log import LossWindow, RunLogger

log = logging.getLogger(__name__)

_MUCH_FOR_A_CPU = 20e6  # trained parameters


def seen_in(batches: list[Batch]) -> Tensor:
    """Images, queries and tokens of some batches, float64[3]."""
    seen = [
        [len(b.images), int(b.query_mask.sum()), int((b.text.segment_ids >= 0).sum())]
        for b in batches
    ]
    return torch.tensor(seen, dtype=torch.float64).sum(0)


def training_loader(
    train_set: EgoIRGBench,
    batches: MicroBatches,
    collate: Collator,
    run: RunConfig,
    device: torch.device,
) -> DataLoader:
    """One rank's micro-batches, made by ``run.num_workers`` processes."""
    return DataLoader(
        train_set,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        num_workers=run.num_workers,
        generator=torch.Generator(),  # a loader draws its workers' seed: not from the run's random state
    )


class Trainer:
    """One training run: built from a configuration, resumed where asked, run to ``max_steps``."""

    def __init__(self, config: Config) -> None:
        run = config.run
        self.config, self.run = config, run
        self.accelerator = make_accelerator(**device_settings(run))
        self.output = Path(run.output_dir)
        resumed = self._resumed_from()
        self.train_set = build_dataset(config, "train")
        self.validation_set = build_dataset(config, "val") if run.validate_every else None
        self.tokenizer = self._tokenizer(resumed)
        set_seed(run.seed)  # every rank builds the same model
        bf16 = self.accelerator.mixed_precision == "bf16"
        self.model = build_model(config.model, self.tokenizer, self.accelerator.device, bf16=bf16)
        self.frozen = frozen_fingerprint(self.model)
        set_seed(run.seed + self.accelerator.process_index)  # but each has its own dropout
        if resumed:
            load_weights(resumed, self.model)
        if run.compile:
            compile_blocks(self.model)
        if run.store_patches is not None:
            self.train_set.stored_patches = stored_patches(
                self.model.rgb_encoder,
                self.train_set,
                Path(run.store_patches),
                self.accelerator,
                settings=config.model["rgb_encoder"],
                batch_size=run.batch_size,
                num_workers=run.num_workers,
            )
        self.wrapped = distribute(self.accelerator, self.model, run.parallel)
        self.optimizer = build_optimizer(self.model, run)
        self.progress = Progress()
        if resumed:
            load_optimizer(resumed, self.optimizer, self.accelerator)
            self.progress = load_progress(resumed)
            self.model.calibrated_thresholds = self.progress.thresholds
            if saved_config(resumed)["run"]["validation_metric"] != run.validation_metric:
                self.progress.best_score = self.progress.best_step = None  # of another scale
        self.loss_weights = losses.active(
            run.loss_weights, image_token_head=self.model.image_token_head
        )
        device = self.accelerator.device
        self.weight_of_terms = torch.tensor(list(self.loss_weights.values()), device=device)
        self.seen = torch.zeros(
            3, dtype=torch.float64, device=device
        )  # images, queries, tokens not yet in progress
        alone = device.type == "cuda" and self.accelerator.num_processes == 1
        self.graphed = run.cuda_graphs and alone and self.model.language_model.supports_cuda_graphs
        self.run_pass = self._forward_backward
        if self.graphed:
            trained = [
                parameter for parameter in self.model.parameters() if parameter.requires_grad
            ]
            self.run_pass = GraphedPass(self._forward_backward, trained, device)
        self.model.text_decoder.graphs = self.graphed
        self.fingerprint = self.train_set.fingerprint() if self.accelerator.is_main_process else ""
        self.truth = Truth(self.validation_set) if self.validation_set else None
        self.journal = RunLogger(
            config, self.output, self.progress, enabled=self.accelerator.is_main_process
        )

    def train(self) -> None:
        """Run every step that is left, with validation and checkpoints on the way."""
        self._announce()
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what making the model took does not count
        window = LossWindow(list(self.loss_weights), self.accelerator.device)
        batches = iter(self._loader())
        with self.journal.bar(self.progress.step, self.run.max_steps) as advance:
            while self.progress.step < self.run.max_steps:
                micro_batches = [next(batches) for _ in range(self.run.gradient_accumulation)]
                window.add(*self.train_step(micro_batches))
                step = self.progress.step
                advance(step)
                last = step == self.run.max_steps
                logged = step % self.run.log_every == 0 or last
                validated = self.run.validate_every and (
                    step % self.run.validate_every == 0 or last
                )
                saved = validated or step % self.run.checkpoint_every == 0 or last
                if logged or saved:
                    window.require_finite(step, self.output / "checkpoints")
                if logged:
                    self._log_window(window)
                    window = LossWindow(list(self.loss_weights), self.accelerator.device)
                if validated:
                    self.validate()
                if saved:
                    self.save()
        self.journal.close()

    def train_step(self, batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step over this rank's micro-batches.

        Every term is normalised by its units over all ranks and micro-batches; DDP averages gradients over ranks,
        hence the factor of the world size.

        Returns:
            Each term's total on this rank, its units over all ranks, and the gradient norm, all on the device.
        """
        names, device = list(self.loss_weights), self.accelerator.device
        counted = torch.cat(
            [losses.counts(batches, names), seen_in(batches)]
        )  # on the CPU, where nothing has to wait
        if not self.graphed:
            batches = [batch.to(device) for batch in batches]
        counted = sum_over_ranks(self.accelerator, counted.to(device, non_blocking=True))
        units, seen = counted[: len(names)], counted[len(names) :]
        factor = self.weight_of_terms / units.clamp(min=1)
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.run)
        totals = torch.zeros(len(names), device=device)
        for number, batch in enumerate(batches, start=1):
            with (
                nullcontext() if number == len(batches) else self.accelerator.no_sync(self.wrapped)
            ):
                totals += self.run_pass(batch, factor)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.run.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        self.progress.step += 1
        self.seen += seen
        return totals, units, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _forward_backward(self, batch: Batch, factor: Tensor) -> Tensor:
        """Forward and backward over one micro-batch: each term's total; the loss is their sum, times ``factor``."""
        term_totals = losses.totals(self.wrapped(batch), batch, list(self.loss_weights))
        self.accelerator.backward((factor * term_totals).sum() * self.accelerator.num_processes)
        return term_totals.detach()

    def validate(self) -> None:
        """Score the real metrics on the first validation images and remember the best step."""
        number = min(self.run.validation_images, len(self.validation_set))
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batches = plan_batches(number, self.run.batch_size)
        own = batches[rank::world_size]
        filler = -(-len(batches) // world_size) - len(
            own
        )  # under FSDP every rank has to take part in every batch
        predicted = predict(
            self.model,
            self.validation_set,
            own + batches[:1] * filler,
            queries_per_annotation=1,
            max_new_tokens=self.run.max_new_tokens,
            num_workers=self.run.num_workers,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )
        records = gather_lists(
            self.accelerator, [r for batch in list(predicted)[: len(own)] for r in batch]
        )
        metrics = score(records, self.truth)
        chosen = metrics.get(
            self.run.validation_metric, 0.0
        )  # absent where there was nothing to measure
        self.progress.thresholds = self.model.calibrated_thresholds = calibrate_thresholds(
            records, self.truth
        )
        if self.progress.best_score is None or chosen >= self.progress.best_score:
            self.progress.best_score, self.progress.best_step = chosen, self.progress.step
        self.journal.write({"kind": "validation", "step": self.progress.step, **metrics})
        log.info(
            "step %d: %s %.3f on %d images",
            self.progress.step,
            self.run.validation_metric,
            chosen,
            number,
        )

    def save(self) -> None:
        """Write a checkpoint; every validated step is written, so the best one is there."""
        started = time.perf_counter()
        self._read_counters()
        size = save_checkpoint(
            self.output,
            self.model,
            self.optimizer,
            self.progress,
            as_dict(self.config),
            self.frozen,
            self.accelerator,
            self.run.keep_checkpoints,
        )
        self.journal.write_manifest(self.progress, self.fingerprint)
        seconds = time.perf_counter() - started
        log.info(
            "step %d: checkpoint of %.2f GB written in %.1f s",
            self.progress.step,
            size / 1e9,
            seconds,
        )

    def _announce(self) -> None:
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(
            p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters
        )  # NF4: two a byte
        log.info(
            "step %d of %d: %.1f M parameters, %.1f M of them trained, on %d images with up to %d queries each, "
            "%d process(es) on %s, under '%s'",
            self.progress.step, self.run.max_steps, total / 1e6, trained / 1e6, len(self.train_set),
            self.train_set.queries_per_image, self.accelerator.num_processes, self.accelerator.device, self.output,
        )  # fmt: skip
        if self.accelerator.device.type == "cpu" and trained > _MUCH_FOR_A_CPU:
            log.warning(
                "no GPU is in use: with %.0f M trained parameters a step can take minutes on a CPU; "
                "train_configs/annexe_tiny.yaml is made for one", trained / 1e6,
            )  # fmt: skip
        if self.run.cuda_graphs and not self.graphed:
            log.warning(
                "run.cuda_graphs is for one process on one GPU without an int8 base and is ignored here"
            )
        if self.train_set.num_slots > self.model.pixel_decoder.num_slots:
            log.warning(
                "annotations use up to %d slots, model.pixel_decoder.num_slots is %d: the model trains on the first "
                "ones, the metrics count all",
                self.train_set.num_slots,
            )  # fmt: skip

    def _resumed_from(self) -> Path | None:
        if self.run.resume == "auto":
            return self._as_begun(find_checkpoint(self.output))
        here = find_checkpoint(self.output)
        if self.run.resume:
            resumed = require_checkpoint(self.run.resume, "latest")
            if here and here.resolve() != resumed.resolve():
                raise UserError(
                    f"run.resume '{resumed}' is not the last checkpoint of run.output_dir '{self.output}', which is "
                    f"'{here.name}': what came after would be lost. Choose another run.output_dir"
                )
            return self._as_begun(resumed)
        if here:
            raise UserError(
                f"run.output_dir '{self.output}' holds a run already; set run.resume=auto to go on with it, "
                "or choose another folder"
            )
        return None

    def _as_begun(self, resumed: Path | None) -> Path | None:
        """Refuse another seed, which fixes the order of samples and random frozen weights, another optimizer, and a
        checkpoint that is further than the run should go.
        """
        if resumed and load_progress(resumed).step > self.run.max_steps:
            raise UserError(
                f"'{resumed}' is past run.max_steps {self.run.max_steps}; raise it to go on"
            )
        before = saved_config(resumed)["run"] if resumed else {}
        for name, begun in (
            ("seed", before.get("seed")),
            ("optimizer", before.get("optimizer", "adamw")),
        ):
            asked = getattr(self.run, name)
            if resumed and asked != begun:
                raise UserError(
                    f"run.{name} is {asked} but '{resumed}' was trained with {begun}; set run.{name}={begun}"
                )
        return resumed

    def _tokenizer(self, resumed: Path | None) -> TextTokenizer:
        """The Llama's tokenizer, that of the run to start from, or one trained on the train split's text."""
        llama, start = (
            self.config.model["language_model"].get("path"),
            self.config.model.get("init_from"),
        )
        before = resumed or (find_checkpoint(Path(start)) if start and not llama else None)
        folder = (
            before / "tokenizer" if before else Path(llama) if llama else self.output / "tokenizer"
        )
        if not (before or llama) and self.accelerator.is_main_process:
            train_tokenizer(
                self.train_set.texts(), self.config.model["pixel_decoder"]["num_slots"]
            ).save(folder)
        self.accelerator.wait_for_everyone()
        return build_tokenizer(self.config, folder)

    def _loader(self) -> DataLoader:
        run = self.run
        batches = MicroBatches(
            len(self.train_set),
            seed=run.seed,
            batch_size=run.batch_size,
            num_batches=(run.max_steps - self.progress.step) * run.gradient_accumulation,
            first_image=self.progress.images,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        collate = Collator(
            self.tokenizer,
            self.model.num_image_tokens,
            self.model.pixel_decoder.num_slots,
            pad_to_multiple_of=PAD_TO_MULTIPLE_OF if self.graphed else 1,
            unpad=self.model.language_model.uses_flex_attention,
            keep_samples=False,
        )
        return training_loader(self.train_set, batches, collate, run, self.accelerator.device)

    def _read_counters(self) -> None:
        """Bring what the device counted since the last call into the progress."""
        images, queries, tokens = self.seen.tolist()
        self.seen.zero_()
        self.progress.images += int(images)
        self.progress.queries += int(queries)
        self.progress.tokens += int(tokens)

    def _log_window(self, window: LossWindow) -> None:
        self._read_counters()
        terms = window.means(sum_over_ranks(self.accelerator, window.totals))
        loss = sum(self.loss_weights[name] * value for name, value in terms.items())
        self.journal.write(
            {
                "kind": "train",
                "step": self.progress.step,
                "epoch": self.progress.images / len(self.train_set),
                "images": self.progress.images,
                "queries": self.progress.queries,
                "tokens": self.progress.tokens,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "loss": loss,
                **{f"loss/{name}": value for name, value in terms.items()},
                "gradient_norm": float(window.norm),
                **self._gpu_memory(),
            }
        )

    def _gpu_memory(self) -> dict[str, float]:
        """Most memory that tensors took on this rank's GPU since training began, in GB (1e9 bytes)."""
        cuda = self.accelerator.device.type == "cuda"
        return {"gpu_memory": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}


def train(config: Config) -> None:
    """Train what ``config`` describes; a second training of the same folder is refused as long as one goes on."""
    with (
        locked(Path(config.run.output_dir)) if os.environ.get("RANK", "0") == "0" else nullcontext()
    ):
        Trainer(config).train()
