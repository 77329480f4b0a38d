"""GPU memory of a training step, predicted by running that very step on tensors without storage.

Model, losses, backward pass and optimizer are the real ones; the tensors are PyTorch's fake ones, which have shapes
and lifetimes but no bytes. They live on the CPU, so what CUDA does otherwise is put right in `CudaRules`.

Legend: B images, S image side, Q queries, K slots, N packed tokens. Sizes are bytes, GB are 1e9 bytes.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from annexe.benchmarks.random_batch import (
    NUM_REAL_BATCHES,
    Branches,
    even_branches,
    longest_batch,
    nominal_branches,
    random_batch,
    real_branches,
    tokens_of_branches,
)
from annexe.build import build_dataset, build_model, build_tokenizer
from annexe.config import PARTS, Config
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.language_model.base_model import DTYPES, QUANTISED
from annexe.models.language_model.tokenizer import BPE_VOCABULARY, TextTokenizer, train_tokenizer
from annexe.structures.batch import Batch, each_tensor
from annexe.structures.prediction import Predictions
from annexe.training import losses
from annexe.training.optimizer import build_optimizer

GB = 1e9
FRAGMENTATION, CONTEXT = (
    1.06,
    0.7 * GB,
)  # what a card needs beside the tensors: gaps between them, and CUDA itself
WORKSPACES = (
    2 * 32 * 2**20
)  # cuBLAS' on Hopper, one for the forward and one for the backward thread
_WORDS_OF_LLAMA = 32000
_REST, _HELD = "embeddings, logits, losses", "held"


def booked(size: int) -> int:
    """What CUDA's caching allocator books for a tensor of ``size`` bytes: multiples of 512 bytes, and of a large one
    the rest of its 2 MiB page too where that is too little to be split off."""
    size = -(-size // 512) * 512
    pages = -(-size // 2**21) * 2**21
    return pages if size >= 10 * 2**20 and pages - size <= 2**20 else size


def _storages(tensors: Any) -> dict[int, torch.UntypedStorage]:
    """Every storage once, of all tensors in a nest of containers."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}


def size_of(tensors: Any) -> int:
    """Bytes booked for all tensors in a nest of containers."""
    return sum(booked(storage.nbytes()) for storage in _storages(tensors).values())


class LiveBytes(TorchDispatchMode):
    """Follows every storage from its first tensor to its last, and remembers the most that lived at a time.

    Attributes:
        part: what storages that appear from now on are put down to.
        current, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.current, self.peak = _HELD, 0, 0
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        """Follow the storages of all tensors in a nest of containers."""
        for key, storage in _storages(tensors).items():
            if key not in self._live:
                size = booked(storage.nbytes())
                self._live[key] = (size, self.part, weakref.ref(storage, partial(self._free, key)))
                self.current += size
                self.peak = max(self.peak, self.current)

    def start(self) -> None:
        """Take all that lives now for held, and begin a new peak."""
        self.part, self.peak = _REST, self.current

    def since_start(self) -> Counter[str]:
        """Living bytes that are not held, by the part they were put down to."""
        sizes: Counter[str] = Counter()
        for size, part, _ in self._live.values():
            sizes[part] += size
        del sizes[_HELD]
        return sizes

    @contextmanager
    def attributing(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Put what appears during the forward pass of a module down to its name."""

        def put_down_to(part: str, *_: Any) -> None:
            self.part = part

        hooks = [
            m.register_forward_pre_hook(partial(put_down_to, name)) for name, m in modules.items()
        ]
        hooks += [m.register_forward_hook(partial(put_down_to, _REST)) for m in modules.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _free(self, key: int, _: weakref.ref) -> None:
        self.current -= self._live.pop(key)[0]


# In float32 under CUDA's autocast, of what models use; under the CPU's these stay in bfloat16.
_IN_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "pow", "__pow__"}
_IN_FLOAT32 |= {"rsqrt", "exp", "log", "norm", "softplus", "cumsum", "prod", "cosine_similarity"}


class CudaRules(TorchFunctionMode):
    """Lets the CPU choose precision and kernels as CUDA would, where that changes what is kept for the backward pass:
    float32 operations under autocast, and dropout, which keeps a mask of one byte an element."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if getattr(func, "__name__", None) in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, self._widened, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    @staticmethod
    def _dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _QuantisedProduct(torch.autograd.Function):
    """Tensors of bitsandbytes' matrix product in number, size and lifetime; their values mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], dtype: str) -> Tensor:
        ctx.shape = shape
        if dtype == "nf4":
            return x @ x.new_empty(shape).t()  # the weight, for a moment whole
        half = x.to(torch.float16)
        codes = half.to(torch.int8)
        sums = codes.new_empty(*x.shape[:-1], shape[0], dtype=torch.int32)
        ctx.kept = x  # bitsandbytes keeps it beside what autograd saves, so that checkpointing a block does not free it
        return sums.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class QuantisedLinear(nn.Module):
    """Takes the memory of a bitsandbytes layer: 1 byte a weight (int8) or 0.516 (nf4 with double quantisation)."""

    def __init__(self, linear: nn.Linear, dtype: str) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(linear.weight.shape), dtype
        number, rows = linear.weight.numel(), linear.weight.shape[0]
        sizes = (
            (number, 4 * rows) if dtype == "int8" else (number // 2, number // 64 + number // 4096)
        )
        for name, size in zip(("codes", "scales"), sizes, strict=True):
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return _QuantisedProduct.apply(x, self.shape, self.dtype)


def without_files(config: Config) -> tuple[Config, Any, list[str]]:
    """The configuration with random weights in place of every file, what stands for its tokenizer, and notes.

    Of the Llama's folder config.json and the tokenizer are read where they exist. The second result has all that
    `build_model` asks of a tokenizer, and ``encode`` where there is a real one.

    Raises:
        UserError: for a config.json that is no Llama's.
    """
    config, notes = copy.deepcopy(config), []
    model = config.model
    language, folder = model["language_model"], model["language_model"].get("path")
    tokenizer, num_words = None, language["vocab_size"] or BPE_VOCABULARY
    if folder is not None and (Path(folder) / "config.json").is_file():
        sizes = _llama_sizes(Path(folder) / "config.json")
        num_words = sizes.pop("vocab_size")
        language.update(sizes)
        if (Path(folder) / "tokenizer.json").is_file() and (
            Path(folder) / "tokenizer_config.json"
        ).is_file():
            tokenizer = build_tokenizer(config, Path(folder))
    elif folder is not None:
        num_words = _WORDS_OF_LLAMA
        notes.append(
            f"no Llama in '{folder}': {language['num_layers']} blocks of width {language['hidden_size']} and "
            f"{num_words} words assumed"
        )
    elif _data_root(config) is not None:
        texts = build_dataset(config, "train", cached=False).texts()
        tokenizer = TextTokenizer(
            train_tokenizer(texts, config.model["pixel_decoder"]["num_slots"]).base,
            config.model["pixel_decoder"]["num_slots"],
            language["vocab_size"],
        )
    else:
        notes.append(f"no data to train a tokenizer on: {num_words} words assumed")
    language["path"] = None
    for block, key in (
        (model, "init_from"),
        (language, "path"),
        *((model[part], "weights") for part in PARTS),
    ):
        if key in block:
            block.update({key: None, "init": "random"})
    stand_in = SimpleNamespace(
        vocab_size=num_words,
        num_slots=config.model["pixel_decoder"]["num_slots"],
        bos_id=1,
        eos_id=2,
    )
    return config, tokenizer or stand_in, notes


def _llama_sizes(path: Path) -> dict[str, int]:
    names = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {ours: int(stored[theirs]) for ours, theirs in names.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"'{path}' is no Llama's ({error!r}); give its Hugging Face folder"
        ) from None


def _data_root(config: Config) -> Path | None:
    """The folder of the data set, where there is one."""
    ((_, dataset),) = config.datasets.items()
    return Path(dataset["data_root"]) if Path(dataset["data_root"]).is_dir() else None


def queries_of(config: Config) -> int:
    ((_, dataset),) = config.datasets.items()
    return dataset["queries_per_image"]


fake_mode = partial(FakeTensorMode, allow_non_fake_inputs=True)


def fake_model(config: Config, tokenizer: Any, mode: FakeTensorMode, *, bf16: bool) -> Annexe:
    """The configured model, of fake tensors on the CPU; ``config`` and ``tokenizer`` are of `without_files`."""
    spec = copy.deepcopy(config.model)
    dtype = spec["language_model"]["dtype"]
    if dtype not in DTYPES:
        spec["language_model"]["dtype"] = "bfloat16"  # float8 takes as much
    model = build_model(spec, tokenizer, torch.device("meta"), bf16=bf16)
    with mode:
        model.to_empty(device="cpu")
        if dtype in QUANTISED:
            for block in model.language_model.llama.model.layers:
                for name, module in list(block.named_modules()):
                    if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                        block.set_submodule(name, QuantisedLinear(module, dtype))
                    if isinstance(
                        module, LoraLayer
                    ):  # under autocast peft widens the input of plain layers alone
                        module.cast_input_dtype_enabled = False
    for block in model.language_model.llama.model.layers:
        if block.gradient_checkpointing:  # the backward pass leaves function modes behind
            block._gradient_checkpointing_func = partial(
                block._gradient_checkpointing_func, context_fn=lambda: (nullcontext(), CudaRules())
            )
    return model.train()


@dataclass
class Plan:
    """Predicted bytes of one training step on one GPU, by part of the model."""

    weights: Counter[str]  # frozen ones and buffers included
    gradients: Counter[str]
    optimizer: Counter[str]
    activations: Counter[str]  # kept for the backward pass
    peak: float
    batch_size: int
    num_queries: int
    num_tokens: int  # N

    @property
    def needs(self) -> float:
        """What a card must have."""
        return self.peak * FRAGMENTATION + CONTEXT


def _forward(model: Annexe, batch: Batch, bf16: bool) -> Predictions:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        return model(batch)


def _sharing(model: Annexe, parallel: str, gpus: int) -> tuple[int, int]:
    """How many GPUs share weights and moments, and the bytes of weights that each gathers whole for a while.

    FSDP has two blocks whole at a time, the running one and the next, and all that is in no block.
    """
    if parallel == "ddp" or gpus == 1:
        return 1, 0
    blocks = [*model.rgb_encoder.vit.blocks, *model.language_model.llama.model.layers]
    sizes = [size_of(list(block.parameters())) for block in blocks]
    return gpus, size_of(list(model.parameters())) - sum(sizes) + 2 * max(sizes)


def measure(
    config: Config, tokenizer: Any, branches: Branches, *, gpus: int = 1, most: float = float("inf")
) -> Plan | None:
    """Run a training step as the trainer does, with the optimizer's moments in place, and book its memory.

    Args:
        config, tokenizer: of `without_files`.
        branches: lengths of the branches of every image of a micro-batch.
        gpus: processes of the run; ``run.parallel`` says how they share.
        most: give up and return None where weights and moments alone take more bytes.
    """
    run, bf16 = config.run, config.run.mixed_precision != "fp32"
    mode, live = fake_mode(), LiveBytes()
    model = fake_model(config, tokenizer, mode, bf16=bf16)
    side, num_words = model.rgb_encoder.image_size, tokenizer.vocab_size
    batch = random_batch(
        branches,
        side,
        model.num_image_tokens,
        config.model["pixel_decoder"]["num_slots"],
        num_words,
    )
    parts = dict(model.named_children())
    trained = {part: [p for p in m.parameters() if p.requires_grad] for part, m in parts.items()}
    terms = list(losses.active(run.loss_weights, image_token_head=model.image_token_head))
    accumulates = run.gradient_accumulation > 1 or (
        gpus > 1 and run.parallel == "ddp"
    )  # DDP's buckets stay
    with mode, live, CudaRules():
        live.add([list(model.parameters()), list(model.buffers())])
        weights = Counter(
            {part: size_of([list(m.parameters()), list(m.buffers())]) for part, m in parts.items()}
        )
        optimizer = build_optimizer(model, run)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        gradients = Counter({part: size_of([p.grad for p in own]) for part, own in trained.items()})
        optimizer.step()
        moments = Counter(
            {part: size_of([optimizer.state[p] for p in own]) for part, own in trained.items()}
        )
        if not accumulates:
            optimizer.zero_grad(set_to_none=True)
        share, gathered = _sharing(model, run.parallel, gpus)
        held = sum(weights.values()) + sum(moments.values())
        saved = held - held / share - gathered  # by spreading over several GPUs
        if live.current - saved > most:
            return None
        batch = each_tensor(batch, mode.from_tensor)
        live.add([batch.images, batch.depth, batch.target_ids])
        live.start()
        with live.attributing(parts):
            total = losses.totals(_forward(model, batch, bf16), batch, terms).sum()
        activations = live.since_start()
        total.backward()
        optimizer.step()
    if share > 1:
        for sizes in (weights, gradients, moments):
            sizes.update({part: size / share - size for part, size in sizes.items()})
        weights["gathered by FSDP"] = gathered
    return Plan(
        weights, gradients, moments, activations, live.peak - saved + WORKSPACES,
        batch_size=len(branches), num_queries=batch.queries.max_queries, num_tokens=batch.text.input_ids.shape[1],
    )  # fmt: skip


def lengths(
    config: Config, tokenizer: Any, num_tokens: int | None
) -> tuple[Callable[[Config], Branches], str]:
    """What gives the lengths of a configuration's batch, and where they come from.

    Raises:
        UserError: for fewer tokens than prefix and branches take.
    """
    if num_tokens is not None:
        num_image_tokens = fake_model(config, tokenizer, fake_mode(), bf16=False).num_image_tokens
        left = tokens_of_branches(num_tokens, num_image_tokens, queries_of(config))
        num_branches = queries_of(config) + 1

        def even(changed: Config) -> Branches:  # fewer queries take fewer tokens
            num_queries = queries_of(changed)
            return even_branches(
                changed.run.batch_size, num_queries, left * (num_queries + 1) // num_branches
            )

        return even, "--tokens"
    if hasattr(tokenizer, "encode") and _data_root(config) is not None:
        drawn = real_branches(config, tokenizer)
        source = f"longest of {NUM_REAL_BATCHES} batches of '{_data_root(config)}'"
        return lambda changed: longest_batch(
            drawn, changed.run.batch_size, queries_of(changed)
        ), source
    source = "nominal, no data or tokenizer"
    return lambda changed: nominal_branches(changed.run.batch_size, queries_of(changed)), source
