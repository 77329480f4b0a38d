"""Score predictions from their records and the data alone, so that those of any system can be.

The records are the lines of ``predictions.jsonl``; nothing here needs a model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from annexe.datasets.image_names import read_subsets, subset_files, warn_of_ignored
from annexe.evaluation.matching import ImageResults, Measured, blind_masks, measure_records
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    Record,
    split_kinds,
)
from annexe.evaluation.truth import LabeledDataset, Truth
from annexe.metrics import (
    AnalysisSlots,
    AnnexeRelease,
    AnswerContradictions,
    ClusterBootstrap,
    DepthMetrics,
    EarlRelease,
    GroundingMetrics,
    MaskCalibration,
    ObjectWithoutHand,
    ParaphraseAgreement,
    PresenceRisk,
    TextMetrics,
    best_threshold,
    judge_slots,
    normalize,
)
from annexe.metrics.analysis import ALL_SLOTS
from annexe.metrics.consistency import Agreement
from annexe.metrics.grounding import QueryResult
from annexe.prompts import NO_TARGET
from annexe.workers import Submit, do_right_here, num_cores

log = logging.getLogger(__name__)

Published = TypeVar("Published", AnnexeRelease, EarlRelease)

Unfinished = Callable[[], dict[str, float]]
"""Waits for scores that other processes may compute, and gives them."""

PROTOCOLS = ("standard", "annexe_release", "earl_release")
TARGET_KINDS = ("none", "single", "multi")  # by the number of targets
RECORDS_PER_PROCESS = 5000  # scoring so many takes longer than starting a process


@dataclass(frozen=True)
class QueryScore:
    """How well one query was answered.

    Attributes:
        target_kind: ``single``, ``multi`` or ``none``.
        groups: hand or category of each of its targets, every one once, by slot.
        intersection: pixels in both the predicted and the true masks.
        union: pixels in either.
        rejected: no predicted mask has a pixel.
        presence: as predicted. Where the system gave none, 0 for a rejected query and 1 for others.
        answer_matches: the answer equals the reference, both normalized.
        mask_ious: slot -> IoU of the predicted mask with the target, of slots that have both.
        analysis: ``right`` or ``wrong``, of the photo's predicted analysis as a whole; None where
            there is none, or the true one cannot be read slot by slot.
    """

    image: str
    annotation: int
    query_id: int | str
    query: str
    is_sentence: bool
    target_kind: str
    groups: tuple[str, ...]
    intersection: int
    union: int
    iou: float
    rejected: bool
    presence: float
    answer_matches: bool
    mask_ious: dict[int, float]
    analysis: str | None


class Scores(NamedTuple):
    """All that was scored of a set of records."""

    metrics: dict[str, Any]  # what metrics.json holds, but for ``meta``
    queries: list[QueryScore]  # in the order of the query records


@dataclass(frozen=True)
class System:
    """The records of one system and what was measured of them, query by query in their order."""

    images: list[ImageRecord]
    queries: list[QueryRecord]
    results: list[QueryResult]
    agreements: dict[str, list[Agreement]]  # by stem

    def of(self, stems: Collection[str]) -> System:
        """The part that belongs to some images."""
        chosen = [index for index, query in enumerate(self.queries) if query.image in stems]
        return System(
            images=[record for record in self.images if record.image in stems],
            queries=[self.queries[index] for index in chosen],
            results=[self.results[index] for index in chosen],
            agreements={
                stem: agreements for stem, agreements in self.agreements.items() if stem in stems
            },
        )


def protocols_of(dataset: LabeledDataset) -> tuple[str, ...]:
    """Those of `PROTOCOLS` that a data set can be scored by: without texts the first one."""
    return PROTOCOLS if dataset.has_text else PROTOCOLS[:1]


def score(records: list[Record], truth: Truth) -> dict[str, float]:
    """The standard metrics of a set of records (grounding after ReLA, CVPR 2023).

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    system = _measure(records, truth)
    return _standard(system, _begin_texts(system, truth, do_right_here), truth)


def score_all(
    records: list[Record],
    truth: Truth,
    *,
    protocols: Collection[str] = PROTOCOLS,
    workers: int | None = None,
    progress: bool = False,
    known: Mapping[str, ImageResults] | None = None,
    submit: Submit = do_right_here,
) -> Scores:
    """All scores of a set of records, and those of every single query.

    A data set without texts has only the standard scores, with the baselines.

    Args:
        records: lines of a predictions file.
        truth: the data set that was predicted.
        protocols: of `PROTOCOLS`; with ``standard`` come intervals, breakdowns, the constant
            baselines on the same queries, and the root's subsets.
        workers: processes that measure masks; any number gives the same result. None: as many as
            are worth starting.
        progress: show a bar.
        known: stem -> what was measured of the image before, for `protocols_of` the data set.
        submit: as `annexe.workers.processes` gives it, for scores of texts.

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    # Measure every mask once
    has_text = truth.dataset.has_text
    images, queries = split_kinds(records)
    if not has_text:
        images = []
    protocols = [name for name in protocols_of(truth.dataset) if name in protocols]
    measured = measure_records(
        queries,
        truth,
        protocols=protocols,
        workers=workers or min(num_cores(), 1 + len(records) // RECORDS_PER_PROCESS),
        progress=progress,
        known=known,
    )
    model = System(images, queries, measured.results["model"], measured.agreements)
    scores = _query_scores(model, truth)

    # Texts take longest, and are scored beside all else
    def begin(system: System) -> tuple[System, Unfinished]:
        return system, _begin_texts(system, truth, submit)

    baselines: dict[str, tuple[System, Unfinished]] = {}
    subsets: dict[str, tuple[System, Unfinished]] = {}
    released: dict[str, Unfinished] = {}
    if "annexe_release" in protocols:
        annexe = _filled(AnnexeRelease(), model, measured.class_pixels, truth)
        released["annexe_release"] = annexe.begin(submit)
    if "earl_release" in protocols:
        earl = _filled(EarlRelease(), model, measured.target_ious, truth)
        released["earl_release"] = earl.begin(submit)
    if "standard" in protocols:
        standard = begin(model)
        for name, system in _baselines([*images, *queries], truth, measured).items():
            baselines[name] = begin(system)
        for name, system in (_subsets(model, truth) if has_text else {}).items():
            subsets[name] = begin(system)

    # The standard scores, with all that stands beside them
    metrics: dict[str, Any] = {}
    if "standard" in protocols:
        metrics["standard"] = _standard(*standard, truth)
        if has_text:
            metrics["intervals"] = bootstrap(scores, model.results).compute()
            metrics["breakdowns"] = _breakdowns(scores, model.results)
        metrics["baselines"] = {name: _standard(*each, truth) for name, each in baselines.items()}
        metrics["subsets"] = {name: _standard(*each, truth) for name, each in subsets.items()}

    # Scores of earlier publications
    for name, release in released.items():
        metrics[name] = release()
    return Scores(metrics, scores)


def query_scores(records: list[Record], truth: Truth) -> list[QueryScore]:
    """The score of every query record, in their order.

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    return _query_scores(_measure(records, truth), truth)


def score_by_video(
    records: list[Record], truth: Truth, *, workers: int, progress: bool
) -> ClusterBootstrap:
    """The records, measured and by video, ready for intervals and comparisons.

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    system = _measure(records, truth, workers=workers, progress=progress)
    return bootstrap(_query_scores(system, truth), system.results)


def bootstrap(scores: list[QueryScore], results: list[QueryResult]) -> ClusterBootstrap:
    """The queries by the video that their image is a frame of: its stem without the last field."""
    clusters = ClusterBootstrap()
    for query, result in zip(scores, results, strict=True):
        video = query.image.rpartition("_")[0] or query.image
        clusters.update(video, result, query.answer_matches)
    return clusters


def calibrate_thresholds(predicted: Iterable[tuple[list[Record], Truth]]) -> list[float]:
    """Thresholds of presence, slot by slot, by which most queries are judged right.

    The first slot decides whether a query is rejected: there the lower of T-acc and N-acc counts.
    A slot that is never, or always, in use keeps 0.5. Only records with ``slot_scores`` count.

    Args:
        predicted: records about each data set, and what is right in it.
    """
    # Scores of all slots, and the slots in use, query by query
    scores: list[list[float]] = []
    used: list[dict[int, int]] = []
    for records, truth in predicted:
        for query in split_kinds(records)[1]:
            if query.slot_scores is not None:
                scores.append(query.slot_scores)
                used.append(truth.annotations(query.image)[query.annotation].slots)

    thresholds = []
    for slot in range(max(map(len, scores), default=0)):
        of_slot = [slot_scores[slot] for slot_scores in scores]
        present = [slot in slots for slots in used]
        thresholds.append(best_threshold(of_slot, present, balanced=slot == 0))
    return thresholds


def constant_baselines(records: list[Record], truth: Truth) -> dict[str, list[Record]]:
    """Predictions that look at nothing, for the queries of ``records``.

    ``constant`` gives the most frequent training analysis and answer, and as mask the union of all
    that any question of the photo names (which no blind system could know: a generous bound).
    ``reject`` says of every query that it has no target.
    """
    # What they say
    images, queries = split_kinds(records)
    dataset = truth.dataset
    analysis, answer = _frequent_texts(dataset)
    answers = {"constant": answer, "reject": NO_TARGET[dataset.answer_format or "sentence"]}
    baselines: dict[str, list[Record]] = {}
    for name in answers:
        baselines[name] = [replace(image, analysis=analysis, depth=None) for image in images]

    # What they point at
    blind: dict[str, dict] = {}  # stem -> baseline -> slot -> mask
    for query in queries:
        if query.image not in blind:
            blind[query.image] = blind_masks(truth.masks(query.image))
        for name, predicted in blind[query.image].items():
            masks = []
            for slot, rle in predicted.items():
                masks.append(PredictedMask(slot=slot, phrase="", score=1.0, rle=rle))
            presence = float(bool(masks))
            answered = replace(query, answer=answers[name], presence=presence, masks=masks)
            baselines[name].append(answered)
    return baselines


def _measure(records: list[Record], truth: Truth, **options: Any) -> System:
    images, queries = split_kinds(records)
    measured = measure_records(queries, truth, **options)
    return System(images, queries, measured.results["model"], measured.agreements)


# Blocks of metrics.json


def _standard(system: System, texts: Unfinished, truth: Truth) -> dict[str, float]:
    """The standard metrics of one system, under the names of ``metrics.json``."""
    overlaps = []
    for query, result in zip(system.queries, system.results, strict=True):
        overlaps.append((query.annotation, *result.overlap))
    metrics = dict(truth.dataset.extra_scores(overlaps))
    masks = _mask_scores(system)
    metrics |= texts() | masks
    stems = {image.image for image in system.images} | {query.image for query in system.queries}
    return metrics | {"num_queries": len(system.queries), "num_images": len(stems)}


def _begin_texts(system: System, truth: Truth, submit: Submit) -> Unfinished:
    """Begin to score analyses and answers; there are no scores where the data set has no texts."""
    analysis = TextMetrics()
    slots = AnalysisSlots()
    answer = TextMetrics()
    if not truth.dataset.has_text:
        return dict
    for image, caption in _analyzed(system, truth):
        analysis.update(image.image, image.analysis, caption)
        slots.add(image.analysis, caption)
    for query in system.queries:
        texts = truth.texts(query.image)
        key = f"{query.image}/{query.annotation}/{query.query_id!r}"  # 0 and "0" are two wordings
        answer.update(
            key,
            query.answer,
            texts.references[query.annotation],
            has_target=texts.has_target[query.annotation],
        )
    unfinished = (analysis.begin("analysis", submit), answer.begin("answer", submit))
    return lambda: unfinished[0]() | slots.compute() | unfinished[1]()


def _analyzed(system: System, truth: Truth) -> Iterator[tuple[ImageRecord, str]]:
    """The images that have a true analysis, each with it."""
    for image in system.images:
        caption = truth.texts(image.image).caption
        if caption.strip():
            yield image, caption


def _mask_scores(system: System) -> dict[str, float]:
    """Scores of masks, of depth, and of how sure and consistent the system is."""
    # Query by query
    grounding = GroundingMetrics()
    calibration = MaskCalibration()
    risk = PresenceRisk()
    hands = ObjectWithoutHand()
    contradictions = AnswerContradictions()
    for query, result in zip(system.queries, system.results, strict=True):
        grounding.add(result)
        calibration.add(result)
        hands.add(result)
        contradictions.add(result, query.answer)
        if query.presence is not None:
            risk.add(result, query.presence)

    # Image by image
    depth = DepthMetrics()
    for image in system.images:
        if image.depth:
            depth.update(image.depth)

    # Question by question, over its wordings
    paraphrases = ParaphraseAgreement()
    for questions in system.agreements.values():
        for question in questions:
            paraphrases.update(question)

    metrics: dict[str, float] = {}
    for metric in (grounding, depth, calibration, risk, paraphrases, hands, contradictions):
        metrics |= metric.compute()
    return metrics


def _filled(metric: Published, system: System, measured: Sequence[Any], truth: Truth) -> Published:
    """The scoring of an earlier publication, with all that it needs.

    Args:
        metric: without anything in it.
        measured: what it takes of the masks of every query.
    """
    for image, caption in _analyzed(system, truth):
        metric.add_analysis(image.analysis, caption)
    for query, of_query in zip(system.queries, measured, strict=True):
        reference = truth.texts(query.image).references[query.annotation]
        metric.add_query(query.answer, reference, of_query)
    return metric


# Scores of single queries


def _query_scores(system: System, truth: Truth) -> list[QueryScore]:
    analyses = {}
    for image, caption in _analyzed(system, truth):
        right = judge_slots(image.analysis, caption)
        if right is not None:
            analyses[image.image] = "right" if right[ALL_SLOTS] else "wrong"
    scores = []
    for query, result in zip(system.queries, system.results, strict=True):
        scores.append(_query_score(query, result, truth, analyses.get(query.image)))
    return scores


def _query_score(
    query: QueryRecord, result: QueryResult, truth: Truth, analysis: str | None
) -> QueryScore:
    # The question, and what is true of it
    annotation = truth.annotations(query.image)[query.annotation]
    question = next(
        question for question in annotation.questions if question["id"] == query.query_id
    )

    # What was predicted
    presence = query.presence
    if presence is None:
        presence = float(not result.rejected)
    true_slots = {target.slot for target in result.targets}
    reference = truth.texts(query.image).references[query.annotation]
    return QueryScore(
        image=query.image,
        annotation=query.annotation,
        query_id=query.query_id,
        query=question["query"],
        is_sentence=question["is_sentence"],
        target_kind=TARGET_KINDS[min(len(result.targets), 2)],
        groups=tuple(dict.fromkeys(target.label for target in result.targets if target.label)),
        intersection=result.overlap.intersection,
        union=result.overlap.union,
        iou=result.overlap.iou,
        rejected=result.rejected,
        presence=presence,
        answer_matches=normalize(query.answer) == normalize(reference),
        mask_ious={mask.slot: mask.overlap.iou for mask in result.masks if mask.slot in true_slots},
        analysis=analysis,
    )


def _breakdowns(
    scores: list[QueryScore], results: list[QueryResult]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mask scores and exact match by number of targets, wording, what is asked for, and analysis.

    The last tells how much worse the answers are about photos whose analysis is wrong.
    """
    # Breakdown -> value -> indices of its queries
    parts: dict[str, dict[str, list[int]]] = {"target_kind": {}, "wording": {}, "group": {}}
    for index, query in enumerate(scores):
        wording = "sentence" if query.is_sentence else "phrase"
        parts["target_kind"].setdefault(query.target_kind, []).append(index)
        parts["wording"].setdefault(wording, []).append(index)
        for group in query.groups:
            parts["group"].setdefault(group, []).append(index)
        if query.analysis is not None:
            parts.setdefault("analysis", {}).setdefault(query.analysis, []).append(index)

    breakdowns: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_value in parts.items():
        breakdowns[name] = {}
        for value, indices in sorted(by_value.items()):
            breakdowns[name][value] = _scores_of_part(
                [scores[index] for index in indices], [results[index] for index in indices]
            )
    return breakdowns


def _scores_of_part(scores: list[QueryScore], results: list[QueryResult]) -> dict[str, float]:
    # Grounding, but not by group: a breakdown has groups of its own
    grounding = GroundingMetrics()
    for result in results:
        grounding.add(result)
    metrics = {}
    for name, value in grounding.compute().items():
        if not name.startswith("grounding/miou/"):
            metrics[name] = value
    num_exact = sum(query.answer_matches for query in scores)
    return metrics | {"answer/exact_match": num_exact / len(scores), "num_queries": len(scores)}


def _subsets(model: System, truth: Truth) -> dict[str, System]:
    """The part of the model in every list of stems of the data root that has predictions."""
    folder = truth.dataset.root / "subsets"
    subsets = {}
    absent = []
    for subset in read_subsets(truth.dataset.root):
        warn_of_ignored(f"'{folder / subset.name}.txt'", "lines", subset.ignored)
        chosen = model.of(set(subset.stems))
        if chosen.images or chosen.queries:
            subsets[subset.name] = chosen
        else:
            absent.append(subset.name)

    # What is not used
    warn_of_ignored(f"'{folder}'", "files", subset_files(truth.dataset.root)[1])
    if absent:
        log.info("subsets without a predicted image: %s", ", ".join(absent))
    return subsets


def _baselines(records: list[Record], truth: Truth, measured: Measured) -> dict[str, System]:
    baselines = {}
    for name, predicted in constant_baselines(records, truth).items():
        images, queries = split_kinds(predicted)
        baselines[name] = System(images, queries, measured.results[name], {})
    return baselines


def _frequent_texts(dataset: LabeledDataset) -> tuple[str, str]:
    """Most frequent analysis and answer of the train split.

    Where the data has no train split, those of the data set itself.
    """
    analyses: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for image in dataset.annotations_of("train") or dataset.annotations:
        if image[0].caption.strip():
            analyses[image[0].caption] += 1
        answers.update(dataset.reference(annotation) for annotation in image)
    analysis = analyses.most_common(1)[0][0] if analyses else ""
    return analysis, answers.most_common(1)[0][0]
