"""METEOR, CIDEr and exact match of generated text."""

from __future__ import annotations

import atexit
import functools
import logging
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import nltk
import numpy as np
from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.translate.meteor_score import single_meteor_score
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

from annexe.errors import UserError
from annexe.workers import Submit, do_right_here

logger = logging.getLogger(__name__)

DEBIAN_WORDNET = Path("/usr/share/wordnet")

# The lexicographer files of WordNet in their numeric order, from the man page lexnames(5WN).
# Debian ships the data base without this list, and nltk cannot read it without.
LEXICOGRAPHER_FILES = """
    adj.all adj.pert adv.all
    noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition
    noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
    noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity
    noun.relation noun.shape noun.state noun.substance noun.time
    verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
    verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social
    verb.stative verb.weather
    adj.ppl
"""
PART_OF_SPEECH_CODES = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}

_PLACEHOLDER = re.compile(r"<msk(_\d+)?>")
_APOSTROPHE = re.compile("['\u2019]")
_PUNCTUATION = re.compile(r"[^\w\s]|_")

# The two parts of nltk's word_tokenize. The first is without its list of English abbreviations,
# which nltk downloads
_SENTENCES = PunktSentenceTokenizer()
_WORDS = NLTKWordTokenizer()
_STEMMER = PorterStemmer()


class TextPair(NamedTuple):
    """One scored answer or analysis, both sides as they are compared."""

    prediction: str
    reference: str
    has_target: bool | None


class TextMetrics:
    """Scores predictions against one reference each; every pair has a key of its own."""

    def __init__(self) -> None:
        self.pairs: dict[str, TextPair] = {}

    def update(
        self, key: str, prediction: str, reference: str, *, has_target: bool | None = None
    ) -> None:
        """Adds one pair.

        Args:
            key: Names the pair; it also fixes the order in which CIDEr sees the corpus.
            prediction: Generated text.
            reference: True text.
            has_target: Whether the query has a target. Pairs without it do not count for exact
                match.

        Raises:
            UserError: The key was added before.
        """
        self._add(key, TextPair(normalize(prediction), normalize(reference), has_target))

    def merge(self, other: TextMetrics) -> None:
        """Adds all pairs of `other`.

        Raises:
            UserError: Both hold the same key.
        """
        for key, pair in other.pairs.items():
            self._add(key, pair)

    def compute(self, prefix: str) -> dict[str, float]:
        """Returns the metrics, as `begin` describes them."""
        return self.begin(prefix)()

    def begin(self, prefix: str, submit: Submit = do_right_here) -> Callable[[], dict[str, float]]:
        """Begins what takes long.

        Args:
            prefix: Of the names.
            submit: As `annexe.workers.processes` gives it.

        Returns:
            A function that gives the metrics, each under `prefix/`; a metric without any pair is
            absent.

        `meteor` needs WordNet. Where it is missing, `meteor_without_synonyms` stands in its place:
        the two differ and never share a name. `exact_match_targets` leaves out the queries without
        a target, which a constant answer gets right.
        """
        if not self.pairs:
            return dict
        pairs = [self.pairs[key] for key in sorted(self.pairs)]
        meteor_score = submit_text(submit, meteor, pairs)
        cider_score = submit_text(submit, cider, pairs)

        def finish() -> dict[str, float]:
            metrics = {
                f"{prefix}/{meteor_name()}": meteor_score.result(),
                f"{prefix}/cider": cider_score.result(),
            }
            return metrics | _exact_matches(prefix, pairs)

        return finish

    def _add(self, key: str, pair: TextPair) -> None:
        if key in self.pairs:
            raise UserError(f"text {key!r} is scored twice; keep one prediction per key")
        self.pairs[key] = pair


@functools.lru_cache(maxsize=2**16)
def normalize(text: str) -> str:
    """Lower-cases a text and removes mask placeholders and punctuation; one space separates words.

    Punctuation separates words (`hand-held` is two), apostrophes do not (`person's` is one).
    """
    text = _PLACEHOLDER.sub(" ", text.lower())
    text = _APOSTROPHE.sub("", text)
    return " ".join(_PUNCTUATION.sub(" ", text).split())


@functools.lru_cache(maxsize=2**16)
def word_tokenize(text: str) -> str:
    """Returns the tokens of nltk's `word_tokenize` with a space between them.

    Case, punctuation and placeholders stay: `<MSK_0>` is the three tokens `<`, `MSK_0` and `>`. An
    abbreviation inside of a text, such as `e.g.`, ends a sentence here, where nltk knows it.
    """
    tokens: list[str] = []
    for sentence in _SENTENCES.tokenize(text):
        tokens += _WORDS.tokenize(sentence)
    return " ".join(tokens)


def submit_text(submit: Submit, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Has a function of this module called where `submit` does it, with the words known here."""
    load_wordnet()  # which may add a folder
    return submit(_with_folders, list(nltk.data.path), work, *arguments)


def _with_folders(folders: list[str], work: Callable[..., Any], *arguments: Any) -> Any:
    nltk.data.path[:] = folders
    return work(*arguments)


@functools.cache
def load_wordnet() -> object | None:
    """Returns nltk's WordNet reader, or None, with a warning, where it is not installed.

    Probed once per process, because `meteor_score` does not always notice that WordNet is missing.
    """
    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        if not DEBIAN_WORDNET.is_dir():
            if parent_process() is None:  # which has said so before
                logger.warning(
                    "WordNet is not installed, so METEOR is computed without synonyms, as "
                    "meteor_without_synonyms; get WordNet by `apt-get install wordnet-base` "
                    "or nltk.download('wordnet')"
                )
            return None
    nltk.data.path.insert(0, _copy_debian_wordnet())
    wordnet.ensure_loaded()
    return wordnet


def _copy_debian_wordnet() -> str:
    """Returns an nltk data folder with a copy of Debian's WordNet.

    nltk refuses links that leave its data folder, hence a copy (28 MB). It is removed when the
    process exits.
    """
    data_folder = tempfile.TemporaryDirectory(prefix="annexe_nltk_data_")
    atexit.register(data_folder.cleanup)
    corpus = Path(data_folder.name) / "corpora" / "wordnet"
    shutil.copytree(DEBIAN_WORDNET, corpus)
    if not (corpus / "lexnames").exists():
        (corpus / "lexnames").write_text(_lexnames())
    # Debian has this file in another package, wordnet-sense-index. nltk opens it at once, but reads
    # it only for other languages, so an empty one will do
    (corpus / "index.sense").touch()
    return data_folder.name


def _lexnames() -> str:
    """The file lexnames that Debian leaves out."""
    lines = []
    for index, name in enumerate(LEXICOGRAPHER_FILES.split()):
        part_of_speech = name.split(".")[0]
        lines.append(f"{index:02d}\t{name}\t{PART_OF_SPEECH_CODES[part_of_speech]}\n")
    return "".join(lines)


class _NoSynonyms:
    """Stands in for WordNet: no word has a synonym."""

    def synsets(self, word: str) -> list:
        return []


class _CachedStemmer:
    """nltk's default stemmer, which takes most of METEOR's time, asked once for each word."""

    def stem(self, word: str) -> str:
        return _stem(word)


@functools.lru_cache(maxsize=2**17)
def _stem(word: str) -> str:
    return _STEMMER.stem(word)


def meteor_name() -> str:
    """Name of METEOR as this machine computes it: synonyms count only where WordNet is."""
    return "meteor" if load_wordnet() is not None else "meteor_without_synonyms"


def meteor(pairs: list[TextPair]) -> float:
    """Mean METEOR as nltk computes it."""
    has_synonyms = load_wordnet() is not None
    scores = [_meteor_of(pair.prediction, pair.reference, has_synonyms) for pair in pairs]
    return math.fsum(scores) / len(scores)


@functools.lru_cache(maxsize=2**18)
def _meteor_of(prediction: str, reference: str, has_synonyms: bool) -> float:
    synonyms = load_wordnet() if has_synonyms else _NoSynonyms()
    return single_meteor_score(
        reference.split(), prediction.split(), stemmer=_CachedStemmer(), wordnet=synonyms
    )


def cider(pairs: list[TextPair]) -> float:
    """CIDEr-D as pycocoevalcap computes it over the corpus of the pairs, bit for bit.

    Its `Cider` scores every pair. Here equal pairs, of which answers have many, are scored once,
    by writing the distinct ones into a scorer of the library.
    """
    # How many references of the whole corpus have each group of words
    scorer = CiderScorer()
    for reference, count in Counter(pair.reference for pair in pairs).items():
        for ngram in cook_test(reference):
            scorer.document_frequency[ngram] += count

    # Distinct pairs. The scorer stops where the tests end, but takes the size of the corpus from
    # the number of references: hence the empty ones
    sides = [(pair.prediction, pair.reference) for pair in pairs]
    distinct = list(dict.fromkeys(sides))
    scorer.ctest = [cook_test(prediction) for prediction, _ in distinct]
    scorer.crefs = [cook_refs([reference]) for _, reference in distinct]
    scorer.crefs += [[]] * (len(pairs) - len(distinct))

    # Every pair counts in the mean
    scores = dict(zip(distinct, scorer.compute_cider(), strict=True))
    return float(np.mean(np.array([scores[side] for side in sides])))


def _exact_matches(prefix: str, pairs: list[TextPair]) -> dict[str, float]:
    """Exact match of the pairs that know whether there is a target, and of those that have one."""
    metrics = {}
    flagged = [pair for pair in pairs if pair.has_target is not None]
    if flagged:
        metrics[f"{prefix}/exact_match"] = exact_match(flagged)
    with_target = [pair for pair in flagged if pair.has_target]
    if with_target:
        metrics[f"{prefix}/exact_match_targets"] = exact_match(with_target)
    return metrics


def exact_match(pairs: list[TextPair]) -> float:
    """Share of predictions equal to their reference."""
    return sum(pair.prediction == pair.reference for pair in pairs) / len(pairs)
