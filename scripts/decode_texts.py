"""Times decoding at full size of what a small trained model says, with and without drafts.

How many steps `run.draft_tokens` saves depends on texts, and how long a step takes on sizes. Random
weights of full size say nothing, so here the language model of a checkpoint speaks inside a large
one, whose other weights add nothing to what it says: further blocks, heads and numbers end in
weights of 0. Tokens are therefore those of the checkpoint but for rounding, and a step reads and
multiplies as many weights as that of any model of the size. Prompts are the checkpoint's own, which
are shorter than those of full size.

    annexe synth data/texts --images 330 --seed 1 --height 240 --val 4 --test 320
    python scripts/decode_texts.py runs/demo/checkpoints/step-00002400 data/texts --drafts 0 4
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe import terminal
from annexe.build import build_dataset, load_config, restore_model
from annexe.config import device_settings
from annexe.distributed import make_accelerator
from annexe.evaluation.predict import PredictionSettings, load_batches, plan_batches
from annexe.models.annexe import Annexe
from annexe.models.language_model.causal_lm import CausalLM, Lora
from annexe.models.language_model.drafts import DeviceDraftTable
from annexe.models.language_model.generation import GreedyDecoder
from annexe.models.language_model.llama import make_llama
from annexe.structures.batch import Batch, PackedText
from annexe.structures.sample import Sample

MAX_NEW_TOKENS = 50
Prompts = tuple[PackedText, Tensor]  # of a batch, and float[B, N, D], embeddings


@dataclass(frozen=True)
class Sizes:
    """Sizes of the large model, by default those of Llama 2 7B."""

    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    mlp_dim: int = 11008
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class FewQuestions:
    """A data set with at most so many questions of each image, other ones of each next image."""

    dataset: Any
    number: int

    def __len__(self) -> int:
        return len(self.dataset)

    def evaluation_sample(self, index: int, queries_per_annotation: int | str) -> Sample:
        """An image with its questions."""
        sample = self.dataset.evaluation_sample(index, queries_per_annotation)
        first = index % max(1, len(sample.turns))
        turns = sample.turns[first:] + sample.turns[:first]
        return replace(sample, turns=turns[: self.number])


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write what the command line asks for; gives the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="of a Llama, without adapters")
    parser.add_argument("data", type=Path, help="data root; photos of split test are asked about")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 4], help="run.draft_tokens")
    parser.add_argument("--batch-size", type=int, default=10, help="photos")
    parser.add_argument("--queries", type=int, default=1, help="questions of a photo, at most")
    parser.add_argument("--batches", type=int, default=12, help="of which the first is left out")
    for name, size in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(size), default=size)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})

    # The small model, and prompts
    settings = [
        f"run.checkpoint={options.checkpoint}",
        f"datasets.ego_irgbench.data_root={options.data}",
        f"run.batch_size={options.batch_size}",
        "run.num_workers=0",
        "datasets.ego_irgbench.cache=false",
    ]
    if sizes.dtype == "float32":
        settings.append("run.mixed_precision=fp32")
    config = load_config(options.checkpoint / "config.yaml", settings)
    accelerator = make_accelerator(**device_settings(config.run))
    model = restore_model(config, options.checkpoint, accelerator)
    dataset = FewQuestions(build_dataset(config, "test", cached=False), options.queries)
    batches = plan_batches(len(dataset), options.batch_size)[: options.batches]
    loaded = load_batches(
        model, dataset, batches, PredictionSettings.of_run(config.run, accelerator)
    )
    prompts = [embedded(model, batch, accelerator, sizes.hidden_size) for batch in loaded]

    # The large one
    with torch.device(accelerator.device):
        large = inside_of(model.language_model, sizes).eval()
    decoder = GreedyDecoder(large)
    on_gpu = accelerator.device.type == "cuda"
    decoder.graphs = on_gpu
    autocast_dtype = None if sizes.dtype == "float32" else torch.bfloat16
    decoder.join_products(autocast_dtype)

    # Decode with each number of drafts
    rows = []
    plain: list[list[list[int]]] = []
    for drafts in options.drafts:
        decoder.draft(drafts)
        decode(decoder, prompts, accelerator)  # captures graphs
        seconds, steps, tokens = decode(decoder, prompts, accelerator)
        plain = plain or tokens
        said = [response for batch in tokens for response in batch]
        said_plainly = [response for batch in plain for response in batch]
        num_equal = sum(a == b for a, b in zip(said, said_plainly, strict=True))
        rows.append(
            {
                "drafts": drafts,
                "decoding, ms": 1e3 * sum(seconds[1:]) / len(seconds[1:]),
                "steps": sum(steps[1:]) / len(steps[1:]),
                "step, ms": 1e3 * sum(seconds[1:]) / sum(steps[1:]),
                "tokens of a response": sum(map(len, said)) / len(said),
                "responses as in the first row": num_equal / len(said),
            }
        )
    terminal.table(list(rows[0]), [[f"{value:.3g}" for value in row.values()] for row in rows])
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), "rows": rows}, default=str))
    return rows


@torch.no_grad()
def embedded(model: Annexe, batch: Batch, accelerator: Any, width: int) -> Prompts:
    """The packed prompts of a batch as the small model has them, followed by zeros."""
    with accelerator.autocast():
        on_device = batch.to(accelerator.device)
        embeddings = model.encode(on_device).embeddings
    return on_device.text, F.pad(embeddings, (0, width - embeddings.shape[-1]))


@torch.no_grad()
def decode(
    decoder: GreedyDecoder, prompts: list[Prompts], accelerator: Any
) -> tuple[list[float], list[int], list[list[list[int]]]]:
    """Decode batch by batch, with drafts that are learned on the way.

    Returns:
        Seconds and steps of each batch, and its responses.
    """
    # Forget what was learned; graphs read the tensors of the table.
    if decoder.drafts is not None:
        decoder.drafts.followers.clear()
        decoder.drafts.drafts.clear()
    if isinstance(decoder.drafts, DeviceDraftTable):
        decoder.drafts.keys.fill_(-1)

    seconds = []
    steps = []
    responses = []
    for text, embeddings in prompts:
        with accelerator.autocast():
            prefill = decoder.language_model.prefill(embeddings, text)
            synchronize(embeddings.device)
            started = time.perf_counter()
            tokens = decoder.decode(prefill, MAX_NEW_TOKENS).tokens
            synchronize(embeddings.device)
        seconds.append(time.perf_counter() - started)
        steps.append(decoder.num_steps)
        responses.append(tokens)
    return seconds, steps, responses


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def inside_of(small: CausalLM, sizes: Sizes) -> CausalLM:
    """A large Llama, on the default device, that says what a small one does."""
    inner = small.base.model
    config = inner.config
    large = make_llama(
        small.tokenizer,
        init="random",
        dtype=sizes.dtype,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        mlp_dim=sizes.mlp_dim,
        vocab_size=config.vocab_size,
        lora=Lora(rank=0),
    )
    outer = large.base.model

    # Numbers of a head, so that those of a small one have the frequencies of rotary positions that
    # they had; scores are divided by the root of another width.
    head_dim = config.hidden_size // config.num_attention_heads
    large_head_dim = sizes.hidden_size // sizes.num_heads
    half = torch.arange(head_dim // 2) * (large_head_dim // head_dim)
    of_head = torch.cat([half, half + large_head_dim // 2])
    heads = torch.arange(config.num_attention_heads)[:, None] * large_head_dim
    places = (heads + of_head).flatten()
    query_scale = math.sqrt(large_head_dim / head_dim)

    # Tables and blocks
    copy(small.mask_embedding.weight, large.mask_embedding.weight)
    copy(small.mask_head.weight, large.mask_head.weight)
    copy(inner.embed_tokens.weight, outer.embed_tokens.weight)
    copy(small.base.lm_head.weight, large.base.lm_head.weight)
    copy_norm(inner.norm, outer.norm)
    for block, source in zip(outer.layers, inner.layers, strict=False):
        copy_norm(source.input_layernorm, block.input_layernorm)
        copy_norm(source.post_attention_layernorm, block.post_attention_layernorm)
        attention = block.self_attn
        given = source.self_attn
        copy(given.q_proj.weight * query_scale, attention.q_proj.weight, rows=places)
        copy(given.k_proj.weight, attention.k_proj.weight, rows=places)
        copy(given.v_proj.weight, attention.v_proj.weight, rows=places)
        copy(given.o_proj.weight, attention.o_proj.weight, columns=places)
        for name in ("gate_proj", "up_proj", "down_proj"):
            copy(getattr(source.mlp, name).weight, getattr(block.mlp, name).weight)

    # The blocks behind, with random weights but for the last ones
    for block in outer.layers[len(inner.layers) :]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return large


def copy(
    source: Tensor, target: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Copy a matrix to some rows and columns, by default the first ones; the others become 0."""
    rows = torch.arange(source.shape[0]) if rows is None else rows
    columns = torch.arange(source.shape[1]) if columns is None else columns
    target.zero_()
    target[rows[:, None], columns] = source.to(target.dtype)


def copy_norm(source: Any, target: Any) -> None:
    """Copy an RMSNorm. The mean is over more numbers, the others of which are 0."""
    width = len(source.weight)
    share = width / len(target.weight)
    target.weight.zero_()
    target.weight[:width] = source.weight * math.sqrt(share)
    target.variance_epsilon = source.variance_epsilon * share


if __name__ == "__main__":
    main()
