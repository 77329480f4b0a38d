"""Score predictions from their records and the data root alone, so that those of any system can be scored.

The records are the lines of ``predictions.jsonl``; nothing here needs a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from annexe.datasets import egohos
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.egohos import EgoHOS
from annexe.datasets.image_names import read_list
from annexe.evaluation.matching import Measured, blind_masks, measure_records
from annexe.evaluation.records import Record
from annexe.evaluation.truth import Truth
from annexe.metrics import (
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
    normalize,
)
from annexe.metrics.consistency import Agreement
from annexe.metrics.grounding import QueryResult
from annexe.prompts import NO_TARGET
from annexe.workers import num_cores

PROTOCOLS = ("standard", "annexe_release", "earl_release")
KINDS = ("none", "single", "multi")  # by the number of targets


@dataclass(frozen=True)
class QueryScore:
    """How well one query was answered.

    Attributes:
        target_kind: ``single``, ``multi`` or ``none``.
        groups: hand or category of each of its targets, every one once, by slot.
        rejected: no predicted mask has a pixel.
        presence: as predicted; where the system gave none, 0 for a rejected query and 1 for any other.
        answer_matches: the answer equals the reference, both normalised.
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


@dataclass(frozen=True)
class System:
    """The records of one system and what was measured of them, query by query in their order."""

    images: list[Record]
    queries: list[Record]
    results: list[QueryResult]
    agreements: dict[str, list[Agreement]]  # by stem

    def of(self, stems: Collection[str]) -> System:
        """The part that belongs to some images."""
        chosen = [n for n, record in enumerate(self.queries) if record["image"] in stems]
        return System(
            [record for record in self.images if record["image"] in stems],
            [self.queries[number] for number in chosen],
            [self.results[number] for number in chosen],
            {stem: own for stem, own in self.agreements.items() if stem in stems},
        )


def score(records: list[Record], truth: Truth) -> dict[str, float]:
    """The standard metrics of a set of records (grounding after ReLA, CVPR 2023)."""
    return _standard(_measured(records, truth), truth)


def score_all(
    records: list[Record],
    truth: Truth,
    *,
    protocols: Collection[str] = PROTOCOLS,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """All that ``metrics.json`` holds but ``meta``.

    Args:
        records: lines of a predictions file.
        truth: the data set that was predicted.
        protocols: of `PROTOCOLS`; with ``standard`` come intervals, breakdowns, the constant baselines on the same
            queries, and the root's subsets.
        workers: processes; any number gives the same result.
        progress: show a bar.
    """
    images, queries = (_of_kind(records, kind) for kind in ("image", "query"))
    is_standard = "standard" in protocols
    measured = measure_records(
        queries, truth, baselines=is_standard, workers=workers, progress=progress
    )
    model = System(images, queries, measured.results["model"], measured.agreements)
    metrics: dict[str, Any] = {}
    if is_standard:
        metrics["standard"] = _standard(model, truth)
        scores = _query_scores(model, truth)
        metrics["intervals"] = bootstrap(scores, model.results).compute()
        metrics["breakdowns"] = _breakdowns(scores, model.results)
        metrics["baselines"] = {
            name: _standard(s, truth) for name, s in _baselines(records, truth, measured).items()
        }
        metrics["subsets"] = _subsets(model, truth)
    if "annexe_release" in protocols:
        metrics["annexe_release"] = _annexe_release(model, truth)
    if "earl_release" in protocols:
        metrics["earl_release"] = _earl_release(model)
    return metrics


def calibrate_thresholds(records: list[Record], truth: Truth) -> list[float]:
    """Thresholds of presence, slot by slot, by which most queries are judged right.

    The first slot settles whether a query is rejected: there the lower of T-acc and N-acc counts. Needs records with
    ``slot_scores``. A slot that is never, or always, in use keeps 0.5.
    """
    queries = [record for record in _of_kind(records, "query") if "slot_scores" in record]
    used = [truth.annotations(record["image"])[record["annotation"]].slots for record in queries]
    num_slots = max((len(record["slot_scores"]) for record in queries), default=0)
    return [
        best_threshold(
            [record["slot_scores"][slot] for record in queries],
            [slot in slots for slots in used],
            balanced=slot == 0,
        )
        for slot in range(num_slots)
    ]


def query_scores(records: list[Record], truth: Truth) -> list[QueryScore]:
    """The score of every query record, in their order."""
    return _query_scores(_measured(records, truth), truth)


def constant_baselines(records: list[Record], truth: Truth) -> dict[str, list[Record]]:
    """Predictions that look at nothing, for the queries of ``records``.

    ``constant``: the most frequent training analysis and answer, and as mask the union of all that any question of the
    photo names (which no blind system could know: a generous bound). ``reject``: no query ever has a target.
    """
    analysis, answer = _frequent_texts(truth.dataset)
    images = [
        {**record, "analysis": analysis, "depth": None} for record in _of_kind(records, "image")
    ]
    answers = {"constant": answer, "reject": NO_TARGET[truth.dataset.answer_format or "sentence"]}
    baselines = {name: list(images) for name in answers}
    blind: dict[str, dict] = {}
    for record in _of_kind(records, "query"):
        stem = record["image"]
        if stem not in blind:
            blind[stem] = blind_masks(truth.masks(stem))
        for name, predicted in blind[stem].items():
            masks = [
                {"slot": slot, "phrase": "", "score": 1.0, "rle": rle}
                for slot, rle in predicted.items()
            ]
            own = {"answer": answers[name], "presence": float(bool(masks)), "masks": masks}
            baselines[name].append({**record, **own})
    return baselines


def category_ious(records: list[Record], truth: Truth) -> dict[str, float]:
    """Of EgoHOS the IoU of every category, sum of I / sum of U over all photos asked, and the plain mean of these."""
    metrics = [GroundingMetrics() for _ in egohos.CATEGORIES]
    for record in records:
        if record["kind"] == "query":
            masks, number = truth.masks(record["image"]), record["annotation"]
            targets = {
                k: masks[i] for k, i in truth.annotations(record["image"])[number].slots.items()
            }
            metrics[number].update(
                {mask["slot"]: mask["rle"] for mask in record["masks"]}, targets, {}
            )
    names = [name for name, _, _ in egohos.CATEGORIES.values()]
    ious = {
        f"egohos/iou_{n}": m.compute().get("grounding/ciou")
        for n, m in zip(names, metrics, strict=True)
    }
    known = {
        name: iou for name, iou in ious.items() if iou is not None
    }  # neither there nor predicted: no IoU
    return known | ({"egohos/iou_mean": sum(known.values()) / len(known)} if known else {})


def bootstrap(scores: list[QueryScore], results: list[QueryResult]) -> ClusterBootstrap:
    """The queries by the video that their image is a frame of: its stem without the last field."""
    clusters = ClusterBootstrap()
    for query, result in zip(scores, results, strict=True):
        clusters.update(query.image.rpartition("_")[0] or query.image, result, query.answer_matches)
    return clusters


def score_by_video(
    records: list[Record], truth: Truth, *, workers: int, progress: bool
) -> ClusterBootstrap:
    """The records, measured and by video, ready for intervals and comparisons."""
    system = _measured(records, truth, workers=workers, progress=progress)
    return bootstrap(_query_scores(system, truth), system.results)


def _measured(records: list[Record], truth: Truth, **how: Any) -> System:
    images, queries = (_of_kind(records, kind) for kind in ("image", "query"))
    measured = measure_records(queries, truth, **how)
    return System(images, queries, measured.results["model"], measured.agreements)


def _standard(system: System, truth: Truth) -> dict[str, float]:
    analysis, answer, depth = TextMetrics(), TextMetrics(), DepthMetrics()
    grounding, calibration, risk = GroundingMetrics(), MaskCalibration(), PresenceRisk()
    paraphrases, hands, contradictions = (
        ParaphraseAgreement(),
        ObjectWithoutHand(),
        AnswerContradictions(),
    )
    for record in system.images:
        analysis.update(
            record["image"], record["analysis"], truth.annotations(record["image"])[0].caption
        )
        if record.get("depth"):
            depth.update(record["depth"])
    for record, result in zip(system.queries, system.results, strict=True):
        stem, number = record["image"], record["annotation"]
        annotation = truth.annotations(stem)[number]
        key = f"{stem}/{number}/{record['query_id']!r}"  # 0 and "0" are two wordings
        reference = truth.dataset.reference(annotation)
        answer.update(key, record["answer"], reference, has_target=bool(annotation.slots))
        for metric in (grounding, calibration, hands):
            metric.add(result)
        contradictions.add(result, record["answer"])
        if "presence" in record:
            risk.add(result, record["presence"])
    for questions in system.agreements.values():
        for question in questions:
            paraphrases.update(question)
    metrics = analysis.compute("analysis") | answer.compute("answer")
    for metric in (grounding, depth, calibration, risk, paraphrases, hands, contradictions):
        metrics |= metric.compute()
    num_images = len({record["image"] for record in (*system.images, *system.queries)})
    return metrics | {"num_queries": len(system.queries), "num_images": num_images}


def _annexe_release(system: System, truth: Truth) -> dict[str, float]:
    metric = AnnexeRelease()
    for record in system.images:
        metric.add_analysis(record["analysis"], truth.annotations(record["image"])[0].caption)
    for record, result in zip(system.queries, system.results, strict=True):
        annotation = truth.annotations(record["image"])[record["annotation"]]
        height, width = truth.size(record["image"])
        metric.add_query(
            record["answer"], truth.dataset.reference(annotation), result, height * width
        )
    return metric.compute()


def _earl_release(system: System) -> dict[str, float]:
    metric = EarlRelease()
    for result in system.results:
        metric.add(result)
    return metric.compute()


def _query_scores(system: System, truth: Truth) -> list[QueryScore]:
    return [_query_score(*pair, truth) for pair in zip(system.queries, system.results, strict=True)]


def _query_score(record: Record, result: QueryResult, truth: Truth) -> QueryScore:
    annotation = truth.annotations(record["image"])[record["annotation"]]
    question = next(
        question for question in annotation.questions if question["id"] == record["query_id"]
    )
    return QueryScore(
        image=record["image"],
        annotation=record["annotation"],
        query_id=record["query_id"],
        query=question["query"],
        is_sentence=question["is_sentence"],
        target_kind=KINDS[min(len(result.targets), 2)],
        groups=tuple(dict.fromkeys(target.label for target in result.targets if target.label)),
        intersection=result.overlap.intersection,
        union=result.overlap.union,
        iou=result.overlap.iou,
        rejected=result.rejected,
        presence=record.get("presence", float(not result.rejected)),
        answer_matches=normalize(record["answer"])
        == normalize(truth.dataset.reference(annotation)),
    )


def _breakdowns(
    scores: list[QueryScore], results: list[QueryResult]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mask scores and exact match by number of targets, wording, and what is asked for."""
    parts: dict[str, dict[str, list[int]]] = {"target_kind": {}, "wording": {}, "group": {}}
    for number, query in enumerate(scores):
        parts["target_kind"].setdefault(query.target_kind, []).append(number)
        parts["wording"].setdefault("sentence" if query.is_sentence else "phrase", []).append(
            number
        )
        for group in query.groups:
            parts["group"].setdefault(group, []).append(number)
    return {
        name: {
            value: _part([(scores[n], results[n]) for n in chosen])
            for value, chosen in sorted(by_value.items())
        }
        for name, by_value in parts.items()
    }


def _part(queries: list[tuple[QueryScore, QueryResult]]) -> dict[str, float]:
    grounding = GroundingMetrics()
    for _, result in queries:
        grounding.add(result)
    metrics = {
        name: value
        for name, value in grounding.compute().items()
        if not name.startswith("grounding/miou/")
    }
    num_exact = sum(query.answer_matches for query, _ in queries)
    return metrics | {"answer/exact_match": num_exact / len(queries), "num_queries": len(queries)}


def _subsets(model: System, truth: Truth) -> dict[str, dict[str, float]]:
    """Standard metrics on every list of stems of the data root that has predictions."""
    subsets = {}
    for path in sorted((truth.dataset.root / "subsets").glob("*.txt")):
        chosen = model.of(set(read_list(path, "subsets")))
        if chosen.images or chosen.queries:
            subsets[path.stem] = _standard(chosen, truth)
    return subsets


def _baselines(records: list[Record], truth: Truth, measured: Measured) -> dict[str, System]:
    return {
        name: System(_of_kind(made, "image"), _of_kind(made, "query"), measured.results[name], {})
        for name, made in constant_baselines(records, truth).items()
    }


def _of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _frequent_texts(dataset: EgoIRGBench) -> tuple[str, str]:
    """Most frequent analysis and answer of the train split, or of the data set itself where there is none."""
    images = dataset.annotations_of("train") or dataset.annotations
    analyses = Counter(annotations[0].caption for annotations in images)
    answers = Counter(
        dataset.reference(annotation) for annotations in images for annotation in annotations
    )
    return analyses.most_common(1)[0][0], answers.most_common(1)[0][0]


RECORDS_A_PROCESS = 5000  # to score so many takes longer than to start a process


def scores_of(records: list[Record], truth: Truth) -> dict[str, Any]:
    """All scores; of EgoHOS, which has no sentences, those of masks alone, with the IoU of its categories."""
    workers = min(num_cores(), 1 + len(records) // RECORDS_A_PROCESS)
    if not isinstance(truth.dataset, EgoHOS):
        return score_all(records, truth, workers=workers)
    queries = [record for record in records if record["kind"] == "query"]
    metrics = score_all(queries, truth, workers=workers)

    def of_masks(scores: dict[str, float], records: list[Record]) -> dict[str, float]:
        kept = {
            name: value
            for name, value in scores.items()
            if not name.startswith(("analysis/", "answer/"))
        }
        return category_ious(records, truth) | kept

    baselines = constant_baselines(queries, truth)
    return {
        "standard": of_masks(metrics["standard"], queries),
        "baselines": {
            name: of_masks(metrics["baselines"][name], made) for name, made in baselines.items()
        },
        "subsets": {},
    }
