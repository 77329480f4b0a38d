"""On a GPU: captured and compiled passes give what the pass itself gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from annexe.datasets.collate import Collator
from annexe.models.compile import compile_blocks
from annexe.models.language_model import decode_operations
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.decode_steps import DecodeStep, VerifyingStep
from annexe.models.language_model.kv_cache import DecodeIndex, SharedPrefixCache
from annexe.models.language_model.packed_mask import packed_attention_mask, packed_tiles
from annexe.models.mask_postprocessing import at_full_size, encode_on_device, postprocess
from annexe.models.pixel_decoder import Attention
from annexe.models.vision_encoders.eva_vit import LinearGELU
from annexe.rle import encode
from annexe.structures.batch import AnswersRead, Batch
from annexe.training import losses
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF, GraphedPass
from tests.test_generation import (
    as_drafts,
    calls_of_a_step,
    random_case,
    require_same_call,
    run_call,
    several_tokens,
)
from tests.test_models import texts_of
from tests.test_packed_attention import COLUMNS, MASKS, plain_attention

NAMES = list(losses.TERMS)
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs and compiled kernels need a GPU"
)


@pytest.mark.parametrize("answers_read", AnswersRead.CHOICES)
def test_gradients_equal_those_launched_one_by_one(make_parts, answers_read):
    model, tokenizer, batch = make_parts(f"model.answers_read={answers_read}")
    device = torch.device("cuda")
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward_backward(batch: Batch, factor: torch.Tensor) -> torch.Tensor:
        totals = losses.totals(model(batch), batch, NAMES)
        (factor * totals).sum().backward()
        return totals.detach()

    collate = Collator(
        tokenizer,
        model.num_image_tokens,
        4,
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF,
        answers_read=model.answers_read,
    )
    batches = [collate(batch.samples), collate(batch.samples[:1]), collate(batch.samples[::-1])]
    factor = torch.rand(len(NAMES), device=device)
    graphed = GraphedPass(forward_backward, trained, device)
    for cpu_batch in batches * 3:  # met, captured, replayed; shapes take turns
        results = []
        for run, inputs in ((forward_backward, cpu_batch.to(device)), (graphed, cpu_batch)):
            torch._foreach_zero_([parameter.grad for parameter in trained])
            totals = run(inputs, factor)
            results.append((totals, [parameter.grad.clone() for parameter in trained]))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert len(graphed.captured) == 2


@pytest.mark.parametrize("answers_read", AnswersRead.CHOICES)
def test_compiled_blocks_give_the_same_without_padding(make_parts, monkeypatch, answers_read):
    # In TF32, cuDNN's default for convolutions, most gradients of this model differ by over 1 %.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, tokenizer, batch = make_parts(
        "model.language_model.lora.rank=4",
        "model.language_model.num_heads=2",
        "model.pixel_decoder.masked_attention=true",
        f"model.answers_read={answers_read}",
    )
    device = torch.device("cuda")
    model.to(device)
    arguments = (tokenizer, model.num_image_tokens, 4)
    read = model.answers_read
    prompts = Collator(*arguments, responses=False, answers_read=read)(batch.samples).to(device)

    def run() -> tuple[torch.Tensor, list[torch.Tensor], list[tuple[str, str]]]:
        """Losses, gradients, and generated analyses and answers."""
        unpad = model.language_model.skips_masked_tiles
        collate = Collator(*arguments, unpad=unpad, answers_read=read)
        device_batch = collate(batch.samples).to(device)
        model.zero_grad()
        totals = losses.totals(model(device_batch), device_batch, NAMES)
        totals.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        texts = texts_of(model.generate(prompts, 6))
        return totals.detach(), gradients, texts

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "skips_masked_tiles", False)
        plain_totals, plain_gradients, plain_texts = run()
    compile_blocks(model)
    totals, gradients, texts = run()
    torch._dynamo.reset()
    assert model.language_model.skips_masked_tiles
    torch.testing.assert_close(totals, plain_totals, atol=1e-3, rtol=1e-3)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert (gradient - plain).norm() <= 1e-2 * plain.norm() + 1e-5
    assert texts == plain_texts


@pytest.mark.parametrize(
    ("autocast", "compiled", "joined"),
    [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, False, True),
    ],
    ids=["float32", "bfloat16", "compiled", "joined", "joined-bfloat16"],
)
@pytest.mark.parametrize("answers_read", AnswersRead.CHOICES)
def test_replayed_steps_of_generation_give_the_same(
    make_parts, autocast, compiled, joined, answers_read
):
    model, tokenizer, batch = make_parts(
        "model.language_model.initializer_range=0.3",
        "model.language_model.num_heads=2",
        f"model.answers_read={answers_read}",
    )
    device = torch.device("cuda")
    model.to(device)
    collate = Collator(
        tokenizer,
        model.num_image_tokens,
        4,
        responses=False,
        answers_read=model.answers_read,
    )
    prompts = [
        collate(samples).to(device) for samples in (batch.samples, batch.samples[:2], batch.samples)
    ]

    def generate() -> list[list[tuple[str, str]]]:
        """Analyses and answers of every batch of prompts."""
        texts = []
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            for prompt_batch in prompts:
                texts.append(texts_of(model.generate(prompt_batch, 20)))
        return texts

    plain = generate()
    model.text_decoder.graphs = True
    if compiled:
        compile_blocks(model)
    if joined:
        assert model.text_decoder.join_products(torch.bfloat16 if autocast else None)
    for texts, plain_texts in zip(generate(), plain, strict=True):
        num_equal = sum(text == other for text, other in zip(texts, plain_texts, strict=True))
        num_other = 1 if autocast else 0  # rounding to bfloat16 may decide between two tokens
        assert num_equal >= len(texts) - num_other
    torch._dynamo.reset()
    assert len(model.text_decoder.captured_steps) >= 2


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("constrain_answers", [False, True], ids=["free", "constrained"])
def test_drafts_give_the_same_tokens_and_masks(make_parts, graphs, constrain_answers):
    model, tokenizer, batch = make_parts(
        "model.language_model.initializer_range=0.3", "model.language_model.num_heads=2"
    )
    model.to("cuda")
    model.constrain_answers = constrain_answers
    decoder = model.text_decoder
    decoder.graphs = graphs
    assert decoder.join_products()
    collate = Collator(tokenizer, model.num_image_tokens, 4, responses=False)
    prompts = [collate(samples).to("cuda") for samples in (batch.samples, batch.samples[:2])]
    steps = []
    launch = DecodeStep.launch

    def generate() -> tuple[list, list[torch.Tensor]]:
        """Texts and masks of all prompts."""
        images = [model.generate(prompt_batch, 20) for prompt_batch in prompts]
        targets = [
            target
            for answered in images
            for image in answered
            for response in image.responses
            for target in postprocess(response).targets
        ]
        return [texts_of(answered) for answered in images], targets

    expected, expected_targets = generate()
    assert decoder.draft(4)
    num_steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeStep, "launch", lambda self: (steps.append(self), launch(self)))
        for _ in range(3):
            steps.clear()
            texts, targets = generate()
            num_steps.append(len(steps))
            assert texts == expected
            assert targets == expected_targets
    assert {type(step) for step in steps} == {VerifyingStep}
    assert num_steps[-1] < num_steps[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [2, 5])
def test_the_kernels_take_several_tokens_of_a_response(dtype, tolerance, num_tokens):
    kernels = pytest.importorskip("annexe.models.language_model.decode_kernels")
    torch.manual_seed(0)
    query, cache, index = random_case(8, 4, 128, 270, 130, 5)
    query, index = several_tokens(query, index, num_tokens)
    index = DecodeIndex(*[tensor.cuda() for tensor in vars(index).values()])
    tensors = [tensor.to("cuda", dtype) for tensor in vars(cache).values()]
    query = query.to("cuda", dtype)
    output = kernels.decode_attention(query, SharedPrefixCache(*tensors), index, 0.09)
    cache = SharedPrefixCache(*[tensor.nan_to_num(0) for tensor in tensors])
    expected = decode_operations.decode_attention(query, cache, as_drafts(index), 0.09)
    num_real = 5 * num_tokens  # the last response is a padding row
    torch.testing.assert_close(
        output[:num_real], expected[:num_real], atol=tolerance, rtol=tolerance
    )


def test_masks_are_encoded_on_the_device_as_on_the_host():
    torch.manual_seed(0)
    logits = torch.randn(40, 16, 16, device="cuda")
    logits[0] = -1
    logits[1] = 1
    sizes = [(1080, 1920), (57, 31)] * 20
    for mask_logits, size, rle in zip(logits, sizes, encode_on_device(logits, sizes), strict=True):
        assert rle == encode(at_full_size(mask_logits[None], size)[0].cpu().numpy())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("width", "compiled"), [(8, False), (64, True), (96, False), (128, False), (256, False)]
)
def test_packed_attention_and_its_gradients_are_those_of_plain_attention(
    width, dtype, tolerance, compiled
):
    kernels = pytest.importorskip("annexe.models.language_model.packed_kernels")
    torch.manual_seed(0)
    for reach, columns in zip(MASKS, COLUMNS, strict=True):
        tiles = packed_tiles(reach.cuda(), columns.cuda())
        query = torch.randn(2, len(columns), 4, width, device="cuda", dtype=dtype)
        key, value = torch.randn(2, 2, 260, 2, width, device="cuda", dtype=dtype)
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        attend = kernels.packed_attention
        attend = torch.compile(attend, fullgraph=True) if compiled else attend
        output = attend(*inputs, tiles, 0.3)
        grad_output = torch.randn_like(output)
        gradients = torch.autograd.grad(output, inputs, grad_output)

        exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        mask = packed_attention_mask(reach, columns).cuda()
        exact = plain_attention(*exact_inputs, mask)
        exact_gradients = torch.autograd.grad(exact, exact_inputs, grad_output.double())
        pairs = zip((output, *gradients), (exact, *exact_gradients), strict=True)
        for result, expected in pairs:
            assert (result - expected).norm() <= tolerance * expected.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernels_give_what_plain_operations_give(dtype, tolerance):
    kernels = pytest.importorskip("annexe.models.language_model.decode_kernels")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    try:
        # 24 responses to three images.
        row_index = torch.full((3, 20), -1)
        row_index[0, :18] = torch.arange(18)
        row_index[1, :1] = 18
        row_index[2, :5] = torch.arange(19, 24)
        image_index, index_in_image = (row_index >= 0).nonzero(as_tuple=True)
        cache = SharedPrefixCache(
            *torch.randn(2, 3, 4, 270, 128).to(dtype), *torch.randn(2, 24, 4, 96, 128).to(dtype)
        )
        key_mask = torch.rand(24, 96) > 0.3
        key_mask[:, 70:] = False
        key_mask[:, 69] = True
        index = DecodeIndex(image_index, index_in_image, row_index, key_mask, torch.tensor([69]))
        query = torch.randn(24, 8, 128).to(dtype)
        output = kernels.decode_attention(query, cache, index, 0.09)
        expected = decode_operations.decode_attention(query, cache, index, 0.09)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_operations_of_a_step_are_the_same_as_kernels(dtype, tolerance):
    kernels = pytest.importorskip("annexe.models.language_model.decode_kernels")
    calls = zip(calls_of_a_step("cuda", dtype), calls_of_a_step("cuda", dtype), strict=True)
    for call, same_call in calls:
        expected = run_call(decode_operations, *same_call)
        require_same_call(call[0], run_call(kernels, *call), expected, tolerance)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_masked_attention_has_gradients_where_scores_are_far_below_zero(compiled):
    width = 64
    device = torch.device("cuda")
    attention = Attention(width, num_heads=2).to(device)
    for linear in (attention.query, attention.key):
        torch.nn.init.eye_(linear.weight)
    tokens = torch.full((1, 40, width), 6.0, device=device, requires_grad=True)
    noise = torch.randn(1, 576, width, device=device)
    pixels = torch.full((1, 576, width), -6.0, device=device) + 0.1 * noise
    allowed = torch.ones(1, 40, 576, dtype=torch.bool, device=device)
    run = torch.compile(attention.forward, fullgraph=True) if compiled else attention
    with torch.autocast("cuda", torch.bfloat16):
        run(tokens, pixels, pixels, allowed).square().sum().backward()
    assert torch.isfinite(tokens.grad).all()
    assert tokens.grad.any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_and_gelu_in_one_kernel_are_nearer_than_in_two(compiled):
    torch.manual_seed(0)
    layer = LinearGELU(nn.Linear(512, 1024)).to("cuda", torch.bfloat16).requires_grad_(False)
    x = 2 * torch.randn(4, 300, 512, device="cuda", dtype=torch.bfloat16)
    sums = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = F.gelu(sums)
    in_two = F.gelu(sums.bfloat16())
    run = torch.compile(layer.forward, fullgraph=True) if compiled else layer
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        in_one = run(x)
    assert in_one.dtype == torch.bfloat16
    assert (in_one - exact).norm() < (in_two - exact).norm()
