"""The words around a question: templates of prompts, our instructions, phrases of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

ANALYSIS_INSTRUCTIONS = (
    "Describe how the hands act on the objects.",
    "Say what the hands do with the objects.",
    "Which interaction does this image show?",
    "Tell what each hand is doing.",
)
"""One is drawn for each training sample; evaluation takes the first."""

QUERY_INSTRUCTION = "Name and locate:"
NO_TARGET_ANSWER = "There is no suitable referring result."
ANSWER_OPENING = "The mask of"
"""How an answer sentence that names a target begins."""

NO_TARGET = {"sentence": NO_TARGET_ANSWER, "phrases": "none"}
"""Answer format -> the answer to a query without a target."""

# Takes apart "The mask of X is <MSK_0>, and the mask of Y is <MSK_1>." and
# "X is in interaction, its mask is <MSK>."
_TARGET = re.compile(
    r"\s*(?:and )?(?:the mask of )?"
    r"([^,.;<>]*?)"
    r"(?: (?:is|are) in interaction, (?:its|their) mask)?"
    r"(?: (?:is|are))? ?<MSK_?(\d{0,4})>",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"<MSK_(\d{1,4})>")


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around image, task and response. Training and generation both read it here.

    There is one prefix for an image, then one branch for each task:

        BOS prefix <image tokens> opening task closing response end

    Args:
        prefix: text before the image tokens.
        analysis: opening and closing of an analysis.
        query: opening and closing of a query.
        begins_with_bos: whether the tokenizer's beginning of sequence stands before the prefix.
        end: the word that ends a response; None is the tokenizer's end of sequence.
    """

    prefix: str
    analysis: tuple[str, str]
    query: tuple[str, str]
    begins_with_bos: bool = True
    end: str | None = None

    def analysis_prompt(self, instruction: str = ANALYSIS_INSTRUCTIONS[0]) -> str:
        """The prompt of the analysis branch, behind the image tokens."""
        opening, closing = self.analysis
        return f"{opening}{instruction}{closing}"

    def query_prompt(self, query: str) -> str:
        """The prompt of a query's branch, behind the image tokens."""
        opening, closing = self.query
        return f"{opening}{QUERY_INSTRUCTION} {query}{closing}"


# Of arXiv 2310.09478; its analyses were trained with two spaces before [/INST]
MINIGPT_V2 = PromptTemplate(
    prefix="[INST] <Img>",
    analysis=("</Img> [caption] ", "  [/INST] "),
    query=("</Img> [vqa] ", " [/INST] "),
)


def phrases_of(answer: str) -> dict[int, str]:
    """Slot -> phrase, for every target that an answer names.

    ``The mask of the right hand is <MSK_0>`` gives slot 0, and bare ``<MSK>`` get the free slots in
    turn. An answer without placeholders is a list of phrases: ``the right hand and the mug`` gives
    slots 0 and 1. One that says there is no target gives none.
    """
    answer = number_placeholders(answer, [])

    # The expression takes milliseconds on a long answer without placeholders
    matches = _TARGET.findall(answer) if "<msk" in answer.lower() else []
    named = {int(slot or 0): phrase.strip() for phrase, slot in matches}
    if named or not answer or answer in NO_TARGET.values():
        return named
    return dict(enumerate(answer.split(" and ")))


def split_answer(answer: str, slots: list[int]) -> list[tuple[str, int | None]]:
    """An answer in pieces: phrases with the slots that they name, and the words between them.

    Args:
        answer: with placeholders or, as a list of phrases, without.
        slots: the used ones, in ascending order.

    Returns:
        Each piece with its slot, or None. Joined they are the answer without its placeholders.
    """
    answer = number_placeholders(answer, slots)
    pieces: list[tuple[str, int | None]] = []
    if "<msk" in answer.lower():
        end = 0
        for target in _TARGET.finditer(answer):
            first, last = target.span(1)
            pieces.append((answer[end:first], None))
            pieces.append((answer[first:last].rstrip(), int(target[2] or 0)))
            # The words up to the placeholder, which is left out with the space before it
            placeholder = answer.rindex("<", last, target.end())
            pieces.append((answer[first + len(pieces[-1][0]) : placeholder].rstrip(), None))
            end = target.end()
        pieces.append((answer[end:], None))
    elif answer and answer not in NO_TARGET.values():
        for index, phrase in enumerate(answer.split(" and ")):
            if index:
                pieces.append((" and ", None))
            pieces.append((phrase, index if index in slots else None))
    else:
        pieces.append((answer, None))
    return [(text, slot) for text, slot in pieces if text]


def number_placeholders(answer: str, slots: list[int]) -> str:
    """An answer whose placeholders all have a number.

    The k-th bare ``<MSK>`` stands for the k-th used slot that no numbered placeholder names. Where
    the used slots do not suffice, the lowest free numbers follow.

    Args:
        answer: with placeholders ``<MSK>`` and ``<MSK_k>``.
        slots: the used ones, in ascending order.
    """
    if "<MSK>" not in answer:
        return answer

    # Slots that are left for the bare ones
    named = {int(slot) for slot in _NUMBERED.findall(answer)}
    num_bare = answer.count("<MSK>")
    spare = [slot for slot in range(len(slots) + len(named) + num_bare) if slot not in slots]
    free = iter(slot for slot in (*slots, *spare) if slot not in named)
    return re.sub("<MSK>", lambda _: f"<MSK_{next(free)}>", answer)


def texts() -> list[str]:
    """All fixed wording of the prompts, so that a tokenizer trained for a run knows it."""
    template = MINIGPT_V2
    analysis_prompts = [template.analysis_prompt(each) for each in ANALYSIS_INSTRUCTIONS]
    return [template.prefix, *analysis_prompts, template.query_prompt(""), NO_TARGET_ANSWER]
