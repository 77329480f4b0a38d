"""`annexe plan`: the GPU memory of a training step, predicted by running that very step on tensors without storage.

Model, losses, backward pass and optimizer are the real ones; the tensors are PyTorch's fake ones, which have shapes
and lifetimes but no bytes. They live on the CPU, so what CUDA does otherwise is put right in `CudaRules`.

Legend: B images, S image side, Q queries, K slots, N packed tokens. Sizes are bytes, GB are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from annexe import losses
from annexe.config import PARTS, Config, load_config
from annexe.datasets import build_dataset, prompts
from annexe.datasets.collate import Batch, PackedText, QueryIndex, Sample, pack
from annexe.errors import UserError
from annexe.files import write_text
from annexe.models import build_model, num_slots, tokenizer_of
from annexe.models.annexe import Annexe, Predictions
from annexe.models.llama import QUANTISED
from annexe.models.tokenizer import TextTokenizer, train_tokenizer
from annexe.optim import build_optimizer
from annexe.trainer import sample_order

HELP = "predict the GPU memory of a training step, and find settings that fit a card"

GB = 1e9
FRAGMENTATION, CONTEXT = 1.06, 0.7 * GB  # what a card needs beside the tensors: gaps between them, and CUDA itself
WORKSPACES = 2 * 32 * 2**20  # cuBLAS' on Hopper, one for the forward and one for the backward thread
_NUM_REAL_BATCHES = 16
_PREFIX, _ANALYSIS, _QUERY = 4, (40, 50), (45, 31)  # tokens of the prefix, and (prompt, response) of a branch
_WORDS_OF_LLAMA, _WORDS_OF_OWN = 32000, 1024
_REST, _HELD = "embeddings, logits, losses", "held"

Branches = list[list[tuple[int, int]]]  # of every image, the analysis first: tokens of prompt and response


def nominal_branches(num_images: int, num_queries: int) -> Branches:
    """Lengths as Ego-IRGBench has them under Llama's tokenizer, every image with all its queries."""
    return [[_ANALYSIS, *[_QUERY] * num_queries] for _ in range(num_images)]


def even_branches(num_images: int, num_queries: int, num_tokens: int) -> Branches:
    """``num_tokens`` behind the prefix of every image, spread evenly over its branches, 60 % of each its prompt."""
    size, more = divmod(num_tokens, num_queries + 1)
    sizes = [size + (number < more) for number in range(num_queries + 1)]
    return [[(max(1, round(0.6 * n)), n - max(1, round(0.6 * n))) for n in sizes] for _ in range(num_images)]


def real_branches(config: Config, tokenizer: Any) -> Branches:
    """Lengths of as many training images as 16 batches take, with annotations and wordings drawn at random."""
    dataset, encode = build_dataset(config, "train", cached=False), tokenizer.encode
    random = np.random.default_rng(config.run.seed)
    branches = []
    for _, index in sample_order(config.run.seed, len(dataset), 0, _NUM_REAL_BATCHES * config.run.batch_size):
        own = dataset.annotations[index]
        pairs = [(prompts.analysis_prompt(), own[0].caption)]
        for number in random.permutation(len(own))[: dataset.queries_per_image].tolist():
            wording = own[number].questions[random.integers(len(own[number].questions))]
            pairs.append((prompts.query_prompt(wording["query"]), dataset.reference(own[number])))
        branches.append([(len(encode(prompt)), len(encode(response)) + 1) for prompt, response in pairs])
    return branches


def longest_batch(branches: Branches, batch_size: int, num_queries: int) -> Branches:
    """The batch of ``batch_size`` consecutive images, with at most ``num_queries`` queries, that has most tokens."""
    cut = [image[: num_queries + 1] for image in branches]
    groups = [cut[start : start + batch_size] for start in range(0, len(cut) - batch_size + 1, batch_size)]
    return max(groups, key=lambda group: max(sum(map(sum, image)) for image in group))


def made_up_batch(
    branches: Branches, image_size: int, num_image_tokens: int, num_slots: int, num_words: int, *, num_prefix: int = 4
) -> Batch:
    """A batch of random pixels and words with branches of the given lengths; half of the slots are in use.

    Args:
        branches: of every image (analysis first), the lengths of prompt and response.
        image_size: S.
        num_image_tokens: image tokens of the prefix.
        num_words: size of the vocabulary that ids are drawn from.
        num_prefix: tokens before the image tokens.
    """
    random = np.random.default_rng(0)

    def words(number: int) -> list[int]:
        return random.integers(num_words, size=number).tolist()

    ids = [[(words(prompt), words(response)) for prompt, response in image] for image in branches]
    image_of_query = [image for image, own in enumerate(branches) for _ in own[1:]]
    shape = (len(branches), image_size, image_size)
    pixels = random.integers(256, size=(*shape, 3), dtype=np.uint8)  # [B, S, S, 3]
    depth = random.uniform(0.5, 2, size=shape).astype(np.float32)
    targets = random.integers(num_slots + 1, size=shape, dtype=np.uint8)
    slots = torch.arange(1, num_slots + 1, dtype=torch.uint8)
    slot_ids = torch.where(slots <= (num_slots + 1) // 2, slots, 0).repeat(len(image_of_query), 1)  # [Q, K]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        depth=torch.from_numpy(depth),
        target_ids=torch.from_numpy(targets),
        text=PackedText(**pack(ids, words(num_prefix), num_image_tokens)),
        queries=QueryIndex(
            image=torch.tensor(image_of_query, dtype=torch.int64),
            place=torch.tensor([place for own in branches for place in range(len(own) - 1)], dtype=torch.int64),
            most=max(len(own) - 1 for own in branches),
        ),
        slot_ids=slot_ids,
        used_slots=torch.stack(slot_ids.nonzero(as_tuple=True)),
        object_ids=slots.repeat(len(branches), 1),
        object_words=torch.from_numpy(random.integers(num_words, size=(len(branches), num_slots, 4))),
        samples=[
            Sample(f"made-up-{n}", pixels[n], depth[n], targets[n], "", [], (image_size, image_size))
            for n in range(len(branches))
        ],
    )


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

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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

        hooks = [m.register_forward_pre_hook(partial(put_down_to, name)) for name, m in modules.items()]
        hooks += [m.register_forward_hook(partial(put_down_to, _REST)) for m in modules.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _free(self, key: int, _: weakref.ref) -> None:
        self.current -= self._live.pop(key)[0]


# In float32 under CUDA's autocast, of what models use; under the CPU's these stay in bfloat16.
_IN_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "interpolate", "pow", "__pow__"}
_IN_FLOAT32 |= {"rsqrt", "exp", "log", "norm", "softplus", "cumsum", "prod", "cosine_similarity"}


class CudaRules(TorchFunctionMode):
    """Lets the CPU choose precision and kernels as CUDA would, where that changes what is kept for the backward pass:
    float32 operations under autocast, and dropout, which keeps a mask of one byte an element."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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
    def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
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
        sizes = (number, 4 * rows) if dtype == "int8" else (number // 2, number // 64 + number // 4096)
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
    tokenizer, num_words = None, language["vocab_size"] or _WORDS_OF_OWN
    if folder is not None and (Path(folder) / "config.json").is_file():
        sizes = _llama_sizes(Path(folder) / "config.json")
        num_words = sizes.pop("vocab_size")
        language.update(sizes)
        if (Path(folder) / "tokenizer.json").is_file() and (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer = tokenizer_of(config, Path(folder))
    elif folder is not None:
        num_words = _WORDS_OF_LLAMA
        notes.append(
            f"no Llama in '{folder}': {language['num_layers']} blocks of width {language['hidden_size']} and "
            f"{num_words} words assumed"
        )
    elif _data_root(config) is not None:
        texts = sorted({*build_dataset(config, "train", cached=False).texts(), *prompts.texts()})
        tokenizer = TextTokenizer(
            train_tokenizer(texts, num_slots(config)).base, num_slots(config), language["vocab_size"]
        )
    else:
        notes.append(f"no data to train a tokenizer on: {num_words} words assumed")
    language["path"] = None
    for block, key in ((model, "init_from"), (language, "path"), *((model[part], "weights") for part in PARTS)):
        if key in block:
            block.update({key: None, "init": "random"})
    stand_in = SimpleNamespace(vocab_size=num_words, num_slots=num_slots(config), bos_id=1, eos_id=2)
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
        raise UserError(f"'{path}' is no Llama's ({error!r}); give its Hugging Face folder") from None


def _data_root(config: Config) -> Path | None:
    """The folder of the data set, where there is one."""
    ((_, dataset),) = config.datasets.items()
    return Path(dataset["data_root"]) if Path(dataset["data_root"]).is_dir() else None


def _queries(config: Config) -> int:
    ((_, dataset),) = config.datasets.items()
    return dataset["queries_per_image"]


fake_mode = partial(FakeTensorMode, allow_non_fake_inputs=True)


def fake_model(config: Config, tokenizer: Any, mode: FakeTensorMode, *, bf16: bool) -> Annexe:
    """The configured model, of fake tensors on the CPU; ``config`` and ``tokenizer`` are of `without_files`."""
    spec = copy.deepcopy(config.model)
    dtype = spec["language_model"]["dtype"]
    if dtype in QUANTISED:
        spec["language_model"]["dtype"] = "bfloat16"
    model = build_model(spec, tokenizer, torch.device("meta"), bf16=bf16)
    with mode:
        model.to_empty(device="cpu")
        if dtype in QUANTISED:
            for block in model.language_model.llama.model.layers:
                for name, module in list(block.named_modules()):
                    if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                        block.set_submodule(name, QuantisedLinear(module, dtype))
                    if isinstance(module, LoraLayer):  # under autocast peft widens the input of plain layers alone
                        module.cast_input_dtype_enabled = False
    for block in model.language_model.llama.model.layers:
        if block.gradient_checkpointing:  # the backward pass leaves function modes behind
            block._gradient_checkpointing_func = partial(
                block._gradient_checkpointing_func, context_fn=lambda: (nullcontext(), CudaRules())
            )
    return model.train()


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """A batch or a part of one with fake tensors."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, Batch | PackedText | QueryIndex):
        return replace(value, **{f.name: _fake(getattr(value, f.name), mode) for f in fields(value)})
    return value


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
    batch = made_up_batch(branches, side, model.num_image_tokens, num_slots(config), num_words, num_prefix=_PREFIX)
    parts = dict(model.named_children())
    trained = {part: [p for p in m.parameters() if p.requires_grad] for part, m in parts.items()}
    terms = [name for name in losses.TERMS if name != "patch_phrase" or model.name_patches]
    accumulates = run.gradient_accumulation > 1 or (gpus > 1 and run.parallel == "ddp")  # DDP's buckets stay
    with mode, live, CudaRules():
        live.add([list(model.parameters()), list(model.buffers())])
        weights = Counter({part: size_of([list(m.parameters()), list(m.buffers())]) for part, m in parts.items()})
        optimizer = build_optimizer(model, run)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        gradients = Counter({part: size_of([p.grad for p in own]) for part, own in trained.items()})
        optimizer.step()
        moments = Counter({part: size_of([optimizer.state[p] for p in own]) for part, own in trained.items()})
        if not accumulates:
            optimizer.zero_grad(set_to_none=True)
        share, gathered = _sharing(model, run.parallel, gpus)
        held = sum(weights.values()) + sum(moments.values())
        saved = held - held / share - gathered  # by spreading over several GPUs
        if live.current - saved > most:
            return None
        batch = _fake(batch, mode)
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
        batch_size=len(branches), num_queries=batch.queries.most, num_tokens=batch.text.input_ids.shape[1],
    )  # fmt: skip


def with_options(config: Config, options: dict[str, Any]) -> Config:
    """A copy of ``config`` with other values under dotted keys that it has."""
    config = copy.deepcopy(config)
    for key, value in options.items():
        *blocks, name = key.split(".")
        at: Any = config
        for block in blocks:
            at = at[block] if isinstance(at, dict) else getattr(at, block)
        if isinstance(at, dict):
            at[name] = value
        else:
            setattr(at, name, value)
    return config


def candidates(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Settings that save memory, each on top of those before it, what costs least first."""
    language, run = config.model["language_model"], config.run
    options: dict[str, Any] = {}
    for number in (language["num_layers"] // 2, language["num_layers"]):
        if number > language["checkpointed_blocks"]:
            options |= {"model.language_model.checkpointed_blocks": number}
            yield options
    size, accumulation = run.batch_size, run.gradient_accumulation
    while size > 1:
        by = 2 if size % 2 == 0 else size  # steps keep their number of images
        size, accumulation = size // by, accumulation * by
        options |= {"run.batch_size": size, "run.gradient_accumulation": accumulation}
        yield options
    can_quantise = language["lora"]["rank"] > 0 and (run.parallel == "ddp" or gpus == 1)
    smaller = {"nf4": (), "int8": ("nf4",)}.get(language["dtype"], QUANTISED)
    for dtype in smaller if can_quantise else ():
        options |= {"model.language_model.dtype": dtype}
        yield options
    (name,), queries = config.datasets, _queries(config)
    while queries > 1:
        queries //= 2
        options |= {f"datasets.{name}.queries_per_image": queries}
        yield options


def propose(
    plan_of: Callable[[Config, float], Plan | None], config: Config, gpus: int, card: float
) -> tuple[dict[str, Any], Plan] | None:
    """The first of `candidates` that fits a card of ``card`` bytes, with its plan; None where none does."""
    hopeless: set[str] = set()  # dtypes whose weights alone are too large
    for options in candidates(config, gpus):
        changed = with_options(config, options)
        dtype = changed.model["language_model"]["dtype"]
        if dtype in hopeless:
            continue
        plan = plan_of(changed, (card - CONTEXT) / FRAGMENTATION)
        if plan is None:
            hopeless.add(dtype)
        elif plan.needs <= card:
            return dict(options), plan
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="configuration file of a training run")
    parser.add_argument("--options", nargs="+", default=[], metavar="A.B=C", help="settings put over the file")
    parser.add_argument("--gpus", type=int, default=1, help="processes of the run, one a GPU (default %(default)s)")
    parser.add_argument("--card", type=float, default=24, metavar="GB", help="memory of a GPU (default %(default)s)")
    parser.add_argument("--tokens", type=int, metavar="N", help="packed tokens of an image, instead of the data's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1 or arguments.card <= 0:
        raise UserError(f"--gpus {arguments.gpus} and --card {arguments.card:g} must be above 0")
    given = load_config(arguments.cfg_path, arguments.options)
    if given.model is None or len(given.datasets) != 1:
        raise UserError(f"'{arguments.cfg_path}' is of no training run; it needs one model and one data set")
    if given.model["language_model"]["type"] != "llama":
        raise UserError("annexe plan knows language models of type llama alone; set model.language_model.type=llama")
    config, tokenizer, notes = without_files(given)
    if config.run.parallel == "fsdp" and arguments.gpus > 1 and config.model["language_model"]["dtype"] in QUANTISED:
        raise UserError("run.parallel=fsdp cannot spread an int8 or nf4 language model; set run.parallel=ddp")
    branches_of, source = lengths(config, tokenizer, arguments.tokens)

    def plan_of(changed: Config, most: float = float("inf")) -> Plan | None:
        return measure(changed, tokenizer, branches_of(changed), gpus=arguments.gpus, most=most)

    card = arguments.card * GB
    plan = plan_of(config)
    proposal = None if plan.needs <= card else propose(plan_of, config, arguments.gpus, card)
    notes.append(f"lengths: {source}")
    show(plan, proposal, arguments.card, notes, arguments.options)
    if arguments.json is not None:
        record = numbers(plan) | {"card": arguments.card, "fits": plan.needs <= card, "notes": notes, "proposal": None}
        if proposal is not None:
            record["proposal"] = {"options": as_options(proposal[0])} | numbers(proposal[1])
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(record, indent=2) + "\n")


def lengths(config: Config, tokenizer: Any, num_tokens: int | None) -> tuple[Callable[[Config], Branches], str]:
    """What gives the lengths of a configuration's batch, and where they come from.

    Raises:
        UserError: for fewer tokens than prefix and branches take.
    """
    if num_tokens is not None:
        num_image_tokens = fake_model(config, tokenizer, fake_mode(), bf16=False).num_image_tokens
        left, num_branches = num_tokens - _PREFIX - num_image_tokens, _queries(config) + 1
        if left < 2 * num_branches:
            least = num_tokens - left + 2 * num_branches
            raise UserError(f"--tokens {num_tokens} is too few for the image and its queries; give at least {least}")

        def even(changed: Config) -> Branches:  # fewer queries take fewer tokens
            num_queries = _queries(changed)
            return even_branches(changed.run.batch_size, num_queries, left * (num_queries + 1) // num_branches)

        return even, "--tokens"
    if hasattr(tokenizer, "encode") and _data_root(config) is not None:
        drawn = real_branches(config, tokenizer)
        source = f"longest of {_NUM_REAL_BATCHES} batches of '{_data_root(config)}'"
        return lambda changed: longest_batch(drawn, changed.run.batch_size, _queries(changed)), source
    return lambda changed: nominal_branches(changed.run.batch_size, _queries(changed)), "nominal, no data or tokenizer"


def as_options(options: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def numbers(plan: Plan) -> dict[str, Any]:
    """A plan in GB, to be written as JSON."""
    sizes = {key: value for key, value in vars(plan).items() if isinstance(value, Counter)}
    parts = list(dict.fromkeys([*plan.weights, *plan.activations]))
    return {
        "parts": {part: {name: sizes[name][part] / GB for name in sizes} for part in parts},
        "peak": plan.peak / GB,
        "needs": plan.needs / GB,
        "batch_size": plan.batch_size,
        "queries_per_image": plan.num_queries,
        "tokens_per_image": plan.num_tokens,
    }


def show(
    plan: Plan, proposal: tuple[dict[str, Any], Plan] | None, card: float, notes: list[str], given: list[str]
) -> None:
    """Print the table and what to put behind the options ``given`` for a card of ``card`` GB."""
    record = numbers(plan)
    columns = ("weights", "gradients", "optimizer", "activations")
    title = (
        f"GB on each GPU: {plan.batch_size} images of {plan.num_tokens} packed tokens, {plan.num_queries} queries each"
    )
    table = Table("part", *columns, title=title)
    for part, sizes in record["parts"].items():
        table.add_row(part.replace("_", " "), *(f"{sizes[name]:.2f}" for name in columns))
    sums = (sum(sizes[name] for sizes in record["parts"].values()) for name in columns)
    table.add_row("all", *(f"{value:.2f}" for value in sums), style="bold")
    lines = [
        f"Peak of a training step: {plan.peak / GB:.1f} GB. The card needs {plan.needs / GB:.1f} GB: "
        f"{FRAGMENTATION - 1:.0%} more for gaps between tensors, {CONTEXT / GB:g} GB for CUDA.",
        *notes,
    ]
    if plan.needs <= card * GB:
        lines.append(f"A card of {card:g} GB is enough.")
    elif proposal is None:
        lines.append(f"Nothing tried fits a card of {card:g} GB. Take a larger one, or a smaller model.")
    else:
        options, smaller = proposal
        lines += [
            f"For a card of {card:g} GB (peak {smaller.peak / GB:.1f} GB, needs {smaller.needs / GB:.1f} GB):",
            f"--options {' '.join([*given, *as_options(options)])}",
        ]
        if options.get("model.language_model.dtype") in QUANTISED:
            lines.append("This takes bitsandbytes: pip install 'annexe[quantise]'")
    console = Console(soft_wrap=True)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
