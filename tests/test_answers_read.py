"""Queries that read the analysis, or descriptor tokens behind its prompt, beside the prefix."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from annexe.benchmarks.flops import num_attended_pairs
from annexe.benchmarks.random_batch import nominal_branches, random_batch
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.inference.predictor import Predictor
from annexe.inference.results import Photo
from annexe.models.annexe import Annexe
from annexe.models.language_model.packed_mask import packed_attention_mask
from annexe.structures.batch import ANALYSIS, AnswersRead, Batch
from annexe.trainer import train
from tests.test_packed_attention import require_every_pair_is_visited
from tests.test_packed_sequence import VARIED

SOURCES = AnswersRead.CHOICES


@pytest.fixture
def make_reader(make_parts):
    """A model whose queries read ``source``, and what collates its batches."""

    def make(source: str, *options: str):
        model, tokenizer, batch = make_parts(f"model.answers_read={source}", *VARIED, *options)

        def collate(samples, **arguments):
            collator = Collator(
                tokenizer, model.num_image_tokens, 4, answers_read=model.answers_read, **arguments
            )
            return collator(samples)

        # Instructions of different lengths
        samples = batch.samples
        samples[0].instruction = "Which one?"
        return model, collate, samples

    return make


def alone(model: Annexe, batch: Batch, branch: int) -> dict[str, torch.Tensor]:
    """Arguments of the stock model for a branch with what it reads, without other branches.

    Descriptor tokens have read an analysis prompt that the queries themselves do not see.
    """
    # The columns of prefix, analysis if it is read, and the branch
    text = batch.text
    image = int(text.branch_image_index[branch])
    segments = text.segment_ids[image]
    is_own = segments == segments[int(text.branch_start[branch])]
    is_there = (segments == 0) | is_own
    is_hidden = torch.zeros_like(is_own)
    if text.context is not None and not is_own[text.prefix_length]:
        start = int(text.context.start[image])
        is_there[: int(text.context.end[image])] = True
        is_hidden[text.prefix_length : start] = True

    # A causal sequence of them
    length = int(is_there.sum())
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask &= ~(is_own[is_there][:, None] & is_hidden[is_there])
    return {
        "inputs_embeds": model.encode(batch).embeddings[image, is_there][None],
        "position_ids": text.position_ids[image, is_there][None],
        "attention_mask": mask[None, None],
    }


def grown(inputs: dict[str, torch.Tensor], embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """``inputs`` with one more token, float[1, 1, D], that reads what the last one reads."""
    positions = inputs["position_ids"]
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask[:, :, -1:]], 2)
    return {
        "inputs_embeds": torch.cat([inputs["inputs_embeds"], embedding], 1),
        "position_ids": torch.cat([positions, positions[:, -1:] + 1], 1),
        "attention_mask": F.pad(mask, (0, 1)).index_fill(3, torch.tensor([mask.shape[3]]), True)
        & torch.ones(mask.shape[2], mask.shape[2], dtype=torch.bool).tril(),
    }


def run_stock(model: Annexe, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Final states by the stock model, float[., D]."""
    llama = model.language_model.base.model
    return llama(**inputs, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    ("source", "unpad"),
    [("prefix", True), ("analysis", False), ("analysis", True), ("descriptor", True)],
)
def test_packed_equals_separate(make_reader, source, unpad):
    model, collate, samples = make_reader(source)
    samples[1].turns = samples[1].turns[:2]
    samples[2].analysis = ""
    batch = collate(samples, unpad=unpad, pad_to_multiple_of=16)
    text = batch.text
    assert batch.query_mask.sum() < len(batch.query_mask), "no query fills the batch up"
    with torch.no_grad():
        hidden = model.language_model(model.encode(batch).embeddings, text)
        for branch, start in enumerate(text.branch_start.tolist()):
            image = text.branch_image_index[branch]
            length = int((text.segment_ids[image] == text.segment_ids[image, start]).sum())
            expected = run_stock(model, alone(model, batch, branch))[-length:]
            packed = hidden[image, start : start + length]
            torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)


def test_positions_go_on_behind_what_is_read(make_reader):
    for source in SOURCES:
        _, collate, samples = make_reader(source)
        text = collate(samples).text
        for branch in range(len(text.branch_start)):
            image = int(text.branch_image_index[branch])
            start = int(text.branch_start[branch])
            first = text.prefix_length
            if source != "prefix" and text.segment_ids[image, start] > ANALYSIS:
                last_read = int(text.context.end[image]) - 1
                first = int(text.position_ids[image, last_read]) + 1
            assert text.position_ids[image, start] == first


def answer_alone(model: Annexe, batch: Batch, branch: int, num_tokens: int) -> list[int]:
    """The greedy answer to a query behind the analysis that is in ``batch``, without any cache."""
    tokens: list[int] = []
    inputs = alone(model, batch, branch)
    while len(tokens) < num_tokens:
        token = int(model.language_model.logits(run_stock(model, inputs)[-1]).argmax())
        if token == model.language_model.tokenizer.eos_id:
            break
        tokens.append(token)
        inputs = grown(inputs, model.language_model.embed(torch.tensor([[token]])))
    return tokens


@pytest.mark.parametrize(
    ("source", "conditioning"),
    [("analysis", "prompt"), ("analysis", "answer"), ("descriptor", "prompt")],
)
def test_generation_equals_feeding_the_generated_analysis_as_the_true_one(
    make_reader, monkeypatch, source, conditioning
):
    options = ["model.pixel_decoder.conditioning=answer"] if conditioning == "answer" else []
    model, collate, samples = make_reader(source, *options)
    model.constrain_answers = False
    tokenizer = model.language_model.tokenizer
    prompts = collate(samples, responses=False)

    # The tokens of the generated analyses, whose words may be read back as others
    decode = model.text_decoder.decode
    decoded = []

    def record(prefill, *arguments):
        responses = decode(prefill, *arguments)
        decoded.append([responses.tokens[i] for i in (~prefill.text.is_query).nonzero()[:, 0]])
        return responses

    monkeypatch.setattr(model.text_decoder, "decode", record)
    images = model.generate(prompts, 6)
    analyses = decoded[0]
    assert [image.analysis for image in images] == [tokenizer.decode(row) for row in analyses]
    assert len(set(map(tuple, analyses))) > 1

    # As true ones, before prompts without answers
    encode_all = tokenizer.encode_all
    given = {f"analysis {image}": tokens for image, tokens in enumerate(analyses)}
    monkeypatch.setattr(
        tokenizer,
        "encode_all",
        lambda texts: [given.get(text) or encode_all([text])[0] for text in texts],
    )
    told = []
    for sample, name in zip(samples, given, strict=True):
        turns = [replace(turn, answer="") for turn in sample.turns]
        told.append(replace(sample, analysis=name, turns=turns))
    batch = collate(told)
    for branch in batch.text.query_branches.tolist():
        column = int(batch.text.branch_start[branch] + batch.text.branch_length[branch])
        batch.text.segment_ids[batch.text.branch_image_index[branch], column] = -1

    # The same words, presence and masks
    said = [response.answer for image in images for response in image.responses]
    with torch.no_grad():
        predicted = model(batch)
        for answer, branch in zip(said, batch.text.query_branches.tolist(), strict=True):
            assert answer == tokenizer.decode(answer_alone(model, batch, branch, 6))
    assert len(set(said)) > 3
    if conditioning == "prompt":
        scores = [response.scores for image in images for response in image.responses]
        expected = predicted.presence_logits.sigmoid()
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)
        masks = [response.masks for image in images for response in image.responses]
        present = model.present_slots(predicted.groundings[-1])
        expected_masks = predicted.mask_logits[present]
        torch.testing.assert_close(torch.cat(masks), expected_masks, atol=1e-3, rtol=1e-3)


def test_mask_flops_and_a_prefix_read_before_follow():
    for read in (AnswersRead("analysis"), AnswersRead("descriptor", 3)):
        # Lengths that are no multiples of a block
        branches = nominal_branches(2, 3)
        branches[1] = branches[1][:2]
        text = random_batch(branches, 14, 150, 4, 100, answers_read=read).text
        dense = packed_attention_mask(text.reach)
        is_token = text.segment_ids >= 0
        num_pairs = num_attended_pairs(text)
        assert num_pairs == int(dense[:, 0][is_token].sum())

        everything = torch.arange(text.input_ids.shape[1])
        gaps = everything[everything % 140 > 5]
        for columns in (everything, everything[text.prefix_length :], gaps):
            assert torch.equal(packed_attention_mask(text.reach, columns), dense[:, :, columns])
            require_every_pair_is_visited(text.reach, columns)


def test_a_predictor_answers_with_and_without_questions(make_reader, scenes):
    """An answer needs the analysis, which is therefore generated first, whatever is asked for."""
    photos = sorted((scenes / "RGB").glob("*.jpg"))[:2]
    question = "Where is the left hand?"
    for source in ("analysis", "descriptor"):
        model, _, _ = make_reader(source)
        model.presence_threshold = 0.0
        predictor = Predictor(
            model,
            device=torch.device("cpu"),
            autocast=nullcontext,
            answer_format="sentence",
            max_new_tokens=6,
        )
        alone, asked = predictor.predict(photos, [[], [question]])
        assert alone.analysis and not alone.answers
        *words, streamed = predictor.stream(photos[1], question)
        assert "".join(words) == asked.answers[0].text == streamed.answers[0].text
        assert streamed.analysis == asked.analysis

        queries: list[int | None] = []

        def on_text(_: int, query: int | None, text: str, queries=queries) -> None:
            queries.append(query)

        predictor.answer_batch([Photo.of(photos[1], question)], on_text)
        assert None in queries and 0 in queries
        if source == "analysis":
            assert queries == sorted(queries, key=lambda query: query is not None)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.answers_read=words", "'words'"),
        ("model.num_descriptor_tokens=0", "must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make_parts, option, message):
    with pytest.raises(UserError, match=message):
        make_parts(option)


def test_no_loss_counts_an_analysis_that_is_read_alone(make_reader):
    _, collate, samples = make_reader("analysis")
    batch = collate(samples)
    told = [replace(samples[0], read_analysis="left hand"), *samples[1:]]
    changed = collate(told, pad_to_multiple_of=16)
    in_first = changed.text.label_positions < changed.text.input_ids.shape[1]
    assert not (changed.text.is_analysis & in_first).any()
    assert (changed.text.is_analysis & ~in_first).any()

    # It is what questions read, and all other labels stay
    read = collate([replace(samples[0], analysis="left hand"), *samples[1:]])
    assert torch.equal(changed.text.context.end, read.text.context.end)
    num_tokens = int(read.text.context.end[0])
    assert torch.equal(changed.text.input_ids[0, :num_tokens], read.text.input_ids[0, :num_tokens])
    is_answer = ~batch.text.is_analysis
    labels = changed.text.labels[~changed.text.is_analysis]
    assert torch.equal(labels[labels >= 0], batch.text.labels[is_answer])


def test_own_analyses_need_questions_that_read_them(make_config):
    with pytest.raises(UserError, match=r"run\.own_analyses is 0\.5"):
        train(make_config("run.own_analyses=0.5", "run.max_steps=2"))
    with pytest.raises(UserError, match="share, from 0 to 1"):
        make_config("run.own_analyses=1.5")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["analysis", "descriptor"])
def test_a_run_trains_goes_on_and_is_evaluated(make_config, tmp_path, source):
    def settings(steps: int, folder: Path, *options: str):
        return make_config(
            f"model.answers_read={source}",
            f"run.output_dir={folder}",
            f"run.max_steps={steps}",
            "run.validate_every=8",
            "run.validation_images=2",
            "run.checkpoint_every=4",
            "run.warmup_steps=4",  # up to there the learning rate is that of any max_steps
            *options,
        )

    # Going on gives what a straight run gives, in the second pass over the data too
    own = ["run.own_analyses=0.5", "run.own_analyses_from=0"] if source == "analysis" else []
    train(settings(8, tmp_path / "straight", *own))
    interrupted = settings(8, tmp_path / "resumed", *own)
    train(replace(interrupted, run=replace(interrupted.run, max_steps=4)))
    train(settings(8, tmp_path / "resumed", *own, "run.resume=auto"))
    weights = [
        (tmp_path / name / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes()
        for name in ("straight", "resumed")
    ]
    assert weights[0] == weights[1]
    files = sorted((tmp_path / "straight").glob("own_analyses/*.json"))
    assert [file.stem for file in files] == (["pass-00000", "pass-00001"] if own else [])
    with pytest.raises(UserError, match="answers_read"):
        train(settings(9, tmp_path / "resumed", "run.resume=auto", "model.answers_read=prefix"))

    # Evaluation, also with the true analyses
    run = tmp_path / "straight"
    options = (f"run.checkpoint={run}", "run.report=false")
    generated = evaluate(settings(8, tmp_path / "generated", *options))
    given_true = settings(8, tmp_path / "true", *options, "run.analysis=true")
    if source == "descriptor":
        with pytest.raises(UserError, match="do not read the analysis"):
            evaluate(given_true)
        return
    assert evaluate(given_true)["meta"]["analysis"] == "true"
    assert "analysis" not in generated["meta"]
    lines = []
    for name in ("generated", "true"):
        text = (tmp_path / name / "predictions.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        lines.append([record for record in records if record["kind"] == "image"])
    assert lines[0] == lines[1], "the generated analyses are what is scored"
