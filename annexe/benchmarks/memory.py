"""GPU memory of a training step, predicted by running that very step on tensors without storage.

Model, losses, backward pass and optimizer are the real ones; the tensors are fake.

Legend: B images, S image side, Q queries, K slots, N packed tokens. Sizes are bytes, GB are 1e9
bytes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from annexe.benchmarks.fake_compile import FakeCompiler
from annexe.benchmarks.fake_model import CudaRules, fake_mode, fake_model
from annexe.benchmarks.random_batch import Branches, random_batch_for
from annexe.benchmarks.random_groups import held_for_rewards, random_groups
from annexe.benchmarks.units import GB
from annexe.config import Config
from annexe.models.annexe import Annexe
from annexe.models.compile import compile_blocks
from annexe.structures.batch import Batch, each_tensor
from annexe.training import losses
from annexe.training.losses import Term
from annexe.training.objective import (
    require_rewardable,
    weights_under_rewards,
    without_dropout,
)
from annexe.training.optimizer import build_optimizer
from annexe.training.policy import policy_terms

# What a card needs beside the tensors: gaps between them, and CUDA itself
FRAGMENTATION = 1.06
CONTEXT = 0.7 * GB
# cuBLAS' on Hopper, one for the forward and one for the backward thread
WORKSPACES = 2 * 32 * 2**20

_PAGE = 2 * 2**20  # CUDA's caching allocator asks for memory in multiples of this
_LARGE = 10 * 2**20  # tensors of this size on have pages of their own
_SPLIT = 2**20  # more than this left over of a page is used for others

_OTHER = "embeddings, logits, losses"  # what appears outside of the components
_HELD = "held"  # weights, moments and the batch


def booked(size: int) -> int:
    """What CUDA's caching allocator books for a tensor of ``size`` bytes.

    That is a multiple of 512 bytes. A large tensor also gets the rest of its 2 MiB page where that
    is too little to be split off.
    """
    size = -(-size // 512) * 512
    pages = -(-size // _PAGE) * _PAGE
    return pages if size >= _LARGE and pages - size <= _SPLIT else size


def size_of(tensors: Any) -> int:
    """Bytes booked for all tensors in a nest of containers."""
    return sum(booked(storage.nbytes()) for storage in _storages(tensors).values())


def _storages(tensors: Any) -> dict[int, torch.UntypedStorage]:
    """Every storage once, of all tensors in a nest of containers."""
    storages = {}
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[storage._cdata] = storage
    return storages


class LiveBytes(TorchDispatchMode):
    """Follows every storage from its first tensor to its last, and remembers the peak.

    Attributes:
        part: what storages that appear from now on are attributed to.
        current: bytes that live now.
        peak: the most bytes that lived at a time since `start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = _HELD
        self.current = 0
        self.peak = 0
        self._is_paused = False
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}  # size, part, storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_paused:
            self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        """Follow the storages of all tensors in a nest of containers."""
        for key, storage in _storages(tensors).items():
            if key not in self._live:
                size = booked(storage.nbytes())
                reference = weakref.ref(storage, partial(self._free, key))
                self._live[key] = (size, self.part, reference)
                self.current += size
                self.peak = max(self.peak, self.current)

    def start(self) -> None:
        """Count all that lives now as held, and begin a new peak."""
        self.part = _OTHER
        self.peak = self.current

    def since_start(self) -> Counter[str]:
        """Living bytes that are not held, by the part they were attributed to."""
        sizes: Counter[str] = Counter()
        for size, part, _ in self._live.values():
            sizes[part] += size
        del sizes[_HELD]
        return sizes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, what appears is not counted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextmanager
    def attributing(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Attribute what appears during the forward pass of a module to its name."""

        def enter(part: str, *_: Any) -> None:
            self.part = part

        hooks = []
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(enter, _OTHER)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _free(self, key: int, _: weakref.ref) -> None:
        self.current -= self._live.pop(key)[0]


@dataclass
class Plan:
    """Predicted bytes of one training step on one GPU, by part of the model."""

    weights: Counter[str]  # frozen ones and buffers included
    gradients: Counter[str]
    optimizer: Counter[str]
    activations: Counter[str]  # saved for the backward pass
    peak: float
    graph_pool: float  # what CUDA graphs keep for themselves, beside a pass without them
    batch_size: int
    num_queries: int
    num_tokens: int  # N

    @property
    def needs(self) -> float:
        """What a card must have."""
        return (self.peak + self.graph_pool) * FRAGMENTATION + CONTEXT


@dataclass(frozen=True)
class Sharding:
    """How several GPUs share what is held.

    FSDP gathers two blocks at a time, the running one and the next, and all that is in no block.
    """

    num_shards: int  # of weights, gradients and moments
    gathered: int  # bytes of weights that each GPU gathers for a while

    @classmethod
    def of(cls, model: Annexe, parallel: str, gpus: int) -> Sharding:
        """The sharding under ``run.parallel``."""
        if parallel == "ddp" or gpus == 1:
            return cls(num_shards=1, gathered=0)
        blocks = [size_of(list(block.parameters())) for block in model.blocks()]
        outside = size_of(list(model.parameters())) - sum(blocks)
        return cls(num_shards=gpus, gathered=outside + 2 * max(blocks))

    def saving(self, size: int) -> float:
        """Bytes that a GPU does not have to hold of ``size``, which is shared."""
        return size - size / self.num_shards - self.gathered

    def share(self, sizes: Counter[str]) -> Counter[str]:
        """What one GPU holds of ``sizes``."""
        if self.num_shards == 1:
            return sizes
        return Counter({part: size / self.num_shards for part, size in sizes.items()})


def measure(
    config: Config,
    tokenizer: Any,
    branches: Branches,
    *,
    gpus: int = 1,
    limit: float = float("inf"),
) -> Plan | None:
    """Run a training step as the trainer does, with the optimizer's moments, and book its memory.

    Args:
        config, tokenizer: of `without_files`.
        branches: lengths of the branches of every image of a micro-batch.
        gpus: processes of the run; ``run.parallel`` says how they share.
        limit: give up and return None where weights and moments alone take more bytes.

    Raises:
        UserError: for a model that cannot be trained on rewards, if the run is to.
    """
    run = config.run
    bf16 = run.mixed_precision != "fp32"
    mode = fake_mode()
    live = LiveBytes()
    model = fake_model(config, tokenizer, mode, bf16=bf16)
    sharding = Sharding.of(model, run.parallel, gpus)
    if run.compile:
        compile_blocks(model, compile=FakeCompiler(live.paused))
    can_use_graphs = sharding.num_shards == 1 and model.language_model.supports_cuda_graphs
    uses_rewards = run.objective == "rewards"
    use_graphs = run.cuda_graphs and can_use_graphs and not uses_rewards
    # Several processes sum gradients where they lie, and graphs find them where they were
    is_replicated = gpus > 1 and run.parallel == "ddp"
    keep_gradients = run.gradient_accumulation > 1 or is_replicated or use_graphs

    # What it trains on; a language model on a GPU leaves padding out
    weights_of_terms = losses.active(
        run.loss_weights,
        image_token_head=model.image_token_head,
        has_depth=model.predicts_depth,
    )
    terms = losses.TERMS
    if uses_rewards:
        require_rewardable(model)
        without_dropout(model)
        batch = random_groups(model, branches, run)
        weights_of_terms = weights_under_rewards(run.rewards, weights_of_terms)
        terms = {**terms, **policy_terms(run.rewards)}
    else:
        batch = random_batch_for(model, branches)

    # The step, phase by phase
    with mode, live, CudaRules():
        weights = _hold_weights(model, live)
        drawing = held_for_rewards(model, branches, run, bf16=bf16) if uses_rewards else None
        optimizer = build_optimizer(model, run)
        gradients, moments = _hold_moments(model, optimizer, keep_gradients=keep_gradients)
        saving = sharding.saving(weights.total() + moments.total())
        if live.current - saving > limit:
            return None
        batch = _hold_batch(batch, mode, live)
        if uses_rewards:
            batch = _hold_patches(model, batch, live, bf16=bf16)
        held = live.current
        of_step = {name: terms[name] for name in weights_of_terms}
        loss, activations = _run_forward(model, batch, of_step, live, bf16=bf16)
        _run_backward(loss, optimizer)
        del drawing

    # What one GPU holds of it
    weights = sharding.share(weights)
    if sharding.num_shards > 1:
        weights["gathered by FSDP"] = sharding.gathered
    return Plan(
        weights=weights,
        gradients=sharding.share(gradients),
        optimizer=sharding.share(moments),
        activations=activations,
        peak=live.peak - saving + WORKSPACES,
        graph_pool=live.peak - held if use_graphs else 0,
        batch_size=len(branches),
        num_queries=batch.queries.max_queries,
        num_tokens=batch.text.input_ids.shape[1],
    )


def _hold_weights(model: Annexe, live: LiveBytes) -> Counter[str]:
    """First phase: the model is there. Gives bytes by part."""
    live.add([list(model.parameters()), list(model.buffers())])
    return _size_by_part(model, lambda part: [list(part.parameters()), list(part.buffers())])


def _hold_moments(
    model: Annexe, optimizer: Optimizer, *, keep_gradients: bool
) -> tuple[Counter[str], Counter[str]]:
    """Second phase: a first step has made the moments. Gives bytes of gradients and of moments."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = _size_by_part(model, lambda part: [p.grad for p in _trained(part)])
    optimizer.step()
    moments = _size_by_part(model, lambda part: [optimizer.state[p] for p in _trained(part)])
    if not keep_gradients:
        optimizer.zero_grad(set_to_none=True)
    return gradients, moments


def _hold_batch(batch: Batch, mode: FakeTensorMode, live: LiveBytes) -> Batch:
    """The batch as fake tensors; all that lives now is held throughout the step."""
    batch = each_tensor(batch, mode.from_tensor)
    live.add([batch.images, batch.depth, batch.target_ids])
    live.start()
    return batch


def _hold_patches(model: Annexe, batch: Batch, live: LiveBytes, *, bf16: bool) -> Batch:
    """The batch with what a frozen RGB encoder made of its images when responses were drawn."""
    if any(each.requires_grad for each in model.rgb_encoder.parameters()):
        return batch
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        patches = model.patches_of(batch)
    live.start()
    return replace(batch, patches=patches)


def _run_forward(
    model: Annexe, batch: Batch, terms: Mapping[str, Term], live: LiveBytes, *, bf16: bool
) -> tuple[Tensor, Counter[str]]:
    """Third phase: the forward pass. Gives the loss, and bytes of what is saved for backward."""
    with live.attributing(dict(model.named_children())):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            predictions = model(batch)
        loss = losses.totals(predictions, batch, list(terms), terms=terms).sum()
    del predictions
    return loss, live.since_start()


def _run_backward(loss: Tensor, optimizer: Optimizer) -> None:
    """Last phase: the backward pass and the optimizer's step."""
    loss.backward()
    optimizer.step()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _size_by_part(model: Annexe, tensors_of: Callable[[nn.Module], Any]) -> Counter[str]:
    """Bytes of what ``tensors_of`` gives for each component of the model."""
    return Counter({name: size_of(tensors_of(part)) for name, part in model.named_children()})
