"""The words around a question: MiniGPT-v2's template, our instructions, and reading phrases back from an answer."""

from __future__ import annotations

import re

# One prefix an image, then one branch a task: BOS PREFIX <image tokens> BRANCH response EOS.
PREFIX = "[INST] <Img>"
ANALYSIS_BRANCH = (
    "</Img> [caption] {instruction}  [/INST] "  # two spaces, as MiniGPT-v2 was trained
)
QUERY_BRANCH = "</Img> [vqa] {instruction} {query} [/INST] "

ANALYSIS_INSTRUCTIONS = (  # one is drawn for each training sample, the first is asked at test time
    "Describe how the hands act on the objects.",
    "Say what the hands do with the objects.",
    "Which interaction does this image show?",
    "Tell what each hand is doing.",
)
QUERY_INSTRUCTION = "Name and locate:"
NO_TARGET_ANSWER = "There is no suitable referring result."
ANSWER_OPENING = "The mask of"  # of an answer sentence that names a target
NO_TARGET = {"sentence": NO_TARGET_ANSWER, "phrases": "none"}  # by answer format

_TARGET = re.compile(
    r"\s*(?:and )?(?:the mask of )?"  # The mask of X is <MSK_0>, and the mask of Y is <MSK_1>.
    r"([^,.;<>]*?)"
    r"(?: (?:is|are) in interaction, (?:its|their) mask)?"  # X is in interaction, its mask is <MSK>.
    r"(?: (?:is|are))? ?<MSK_?(\d{0,4})>",
    re.I,
)


def analysis_prompt(instruction: str = ANALYSIS_INSTRUCTIONS[0]) -> str:
    return ANALYSIS_BRANCH.format(instruction=instruction)


def query_prompt(query: str) -> str:
    return QUERY_BRANCH.format(instruction=QUERY_INSTRUCTION, query=query)


def phrases_of(answer: str) -> dict[int, str]:
    """Phrase of each placeholder of an answer sentence: ``The mask of the right hand is <MSK_0>`` gives slot 0.

    A bare ``<MSK>`` counts as slot 0. An answer without placeholders is a list of phrases: ``the right hand and the
    mug`` gives slots 0 and 1; one that says there is no target gives none.
    """
    found = (
        _TARGET.findall(answer) if "<msk" in answer.lower() else []
    )  # a long answer without takes it milliseconds
    named = {int(slot or 0): phrase.strip() for phrase, slot in found}
    if named or not answer or answer in NO_TARGET.values():
        return named
    return dict(enumerate(answer.split(" and ")))


def texts() -> list[str]:
    """All fixed wording of the prompts, so that a tokenizer trained for a run knows it."""
    return [
        PREFIX,
        *map(analysis_prompt, ANALYSIS_INSTRUCTIONS),
        query_prompt(""),
        NO_TARGET_ANSWER,
    ]
