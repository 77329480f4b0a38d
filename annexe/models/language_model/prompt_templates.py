"""Prompt templates: how the language model was trained to be asked, with the image in its place.

A template is a registered function of a Hugging Face tokenizer. Tags such as MiniGPT-v2's ``[vqa]``
are in the templates of models that were trained with them; others tell tasks apart by their words.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from annexe.errors import UserError
from annexe.prompts import MINIGPT_V2, PromptTemplate
from annexe.registry import lookup, register

_SETTING = "model.language_model.prompt_template"
# Words that stand for image and task while a chat template is split around them
_IMAGE = "(here-is-the-image)"
_TASK = "(here-is-the-task)"
_RESPONSE = "(here-is-the-response)"
# Image tokens of InternVL, Qwen-VL and LLaVA
_IMAGE_WORDS = ("<IMG_CONTEXT>", "<|image_pad|>", "<image>")


def find_template(name: str, base: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template that a setting names, for a tokenizer.

    Raises:
        UserError: for an unknown name, or a template that the tokenizer has no words for.
    """
    template = lookup("prompt_template", name, _SETTING)(base)
    if template.end is not None and template.end not in base.get_vocab():
        raise UserError(
            f"{_SETTING} {name} ends a response with '{template.end}', which the tokenizer does "
            "not know; set it to auto, plain or minigpt_v2"
        )
    return template


@register("prompt_template", "minigpt_v2")
def minigpt_v2(_: PreTrainedTokenizerBase) -> PromptTemplate:
    """That of MiniGPT-v2 (arXiv 2310.09478), for Llama 2 and models from scratch."""
    return MINIGPT_V2


@register("prompt_template", "chatml")
def chatml(_: PreTrainedTokenizerBase) -> PromptTemplate:
    """ChatML without a system message, as SmolLM2, Qwen and InternVL were trained with it."""
    around = ("\n", "<|im_end|>\n<|im_start|>assistant\n")
    return PromptTemplate(
        prefix="<|im_start|>user\n",
        analysis=around,
        query=around,
        begins_with_bos=False,
        end="<|im_end|>",
    )


@register("prompt_template", "llama3")
def llama3(_: PreTrainedTokenizerBase) -> PromptTemplate:
    """That of Llama 3 without a system message (its model card)."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    around = ("\n", f"<|eot_id|>{header.format('assistant')}")
    return PromptTemplate(
        prefix=header.format("user"), analysis=around, query=around, end="<|eot_id|>"
    )


@register("prompt_template", "plain")
def plain(base: PreTrainedTokenizerBase) -> PromptTemplate:
    """Image, task and response on a line each, for base models that know no chat."""
    around = ("\n", "\n")
    has_bos = base.bos_token_id is not None
    return PromptTemplate(prefix="", analysis=around, query=around, begins_with_bos=has_bos)


@register("prompt_template", "auto")
def auto(base: PreTrainedTokenizerBase) -> PromptTemplate:
    """The tokenizer's own chat template, split around image and task.

    Raises:
        UserError: if there is none, or it cannot be split.
    """
    if not base.chat_template:
        raise UserError(
            f"{_SETTING} auto takes the tokenizer's own chat template, and it has none; set it to "
            "plain, chatml, llama3 or minigpt_v2"
        )

    # A conversation up to the response, and with it
    user = {"role": "user", "content": f"{_IMAGE}\n{_TASK}"}
    assistant = {"role": "assistant", "content": _RESPONSE}
    asked = _render(base, [user], add_generation_prompt=True)
    answered = _render(base, [user, assistant], add_generation_prompt=False)

    # The pieces around what changes
    prefix, _, rest = asked.partition(_IMAGE)
    opening, _, closing = rest.partition(_TASK)
    behind = answered.rpartition(_RESPONSE)[2]
    if not closing or _RESPONSE not in answered:
        raise UserError(
            f"{_SETTING} auto cannot split the tokenizer's chat template, which leaves out what it "
            "is given; set it to plain, chatml, llama3 or minigpt_v2"
        )
    around = (opening, closing)
    return PromptTemplate(
        prefix=prefix,
        analysis=around,
        query=around,
        begins_with_bos=False,  # the rendered text holds it where it belongs
        end=_first_special_word(base, behind),
    )


def _render(
    base: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Raises:
        UserError: if the template cannot be applied.
    """
    try:
        text = base.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, and raises whatever it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{_SETTING}: cannot apply the tokenizer's chat template ({reason}); set it to "
            "plain, chatml, llama3 or minigpt_v2"
        ) from None
    assert isinstance(text, str)
    return text


def _first_special_word(base: PreTrainedTokenizerBase, text: str) -> str | None:
    """The first special token in ``text``, or None: what ends a response in a chat template."""
    for token in base(text, add_special_tokens=False)["input_ids"]:
        word = base.convert_ids_to_tokens(token)
        if word in base.get_added_vocab():
            return word
    return None


@register("prompt_template", "image_chat")
def image_chat(base: PreTrainedTokenizerBase) -> PromptTemplate:
    """The chat template of a vision-language model, split around the image token and the task.

    What its processor puts around the tokens of an image, as InternVL's does, is added.

    Raises:
        UserError: if there is none, it cannot be split, or its pieces are other tokens than the
            whole.
    """
    if not base.chat_template:
        raise UserError(
            f"{_SETTING} image_chat takes the chat template of a vision-language model, and the "
            "folder has none (chat_template.jinja is missing); fetch it, or set it to chatml"
        )

    # A conversation up to the response, and with it
    content = [{"type": "image"}, {"type": "text", "text": _TASK}]
    user = {"role": "user", "content": content}
    answer = [{"type": "text", "text": _RESPONSE}]
    asked = _render(base, [user], add_generation_prompt=True)
    answered = _render(
        base, [user, {"role": "assistant", "content": answer}], add_generation_prompt=False
    )

    # The pieces around what changes
    words = [word for word in _image_words(base) if asked.count(word) == 1]
    rest, _, closing = asked.partition(_TASK)
    if len(words) != 1 or not closing or _RESPONSE not in answered or words[0] not in rest:
        raise UserError(
            f"{_SETTING} image_chat cannot split the chat template, which writes an image and a "
            f"task as '{asked[:200]}'; set it to chatml or plain"
        )
    prefix, _, opening = rest.partition(words[0])
    if words[0] == getattr(base, "context_image_token", None):
        prefix = f"{prefix}{base.start_image_token}"  # type: ignore[attr-defined]
        opening = f"{base.end_image_token}{opening}"  # type: ignore[attr-defined]
    _require_same_tokens(base, prefix, words[0], f"{opening}{_TASK}{closing}")

    behind = answered.rpartition(_RESPONSE)[2]
    around = (opening, closing)
    return PromptTemplate(
        prefix=prefix,
        analysis=around,
        query=around,
        begins_with_bos=False,
        end=_first_special_word(base, behind),
    )


def _image_words(base: PreTrainedTokenizerBase) -> list[str]:
    """Words that stand for an image token in templates, as far as the tokenizer knows them."""
    named = [getattr(base, name, None) for name in ("context_image_token", "image_token")]
    words = [word for word in (*named, *_IMAGE_WORDS) if word is not None]
    vocabulary = base.get_vocab()
    return [word for word in dict.fromkeys(words) if word in vocabulary]


def _require_same_tokens(
    base: PreTrainedTokenizerBase, prefix: str, image: str, branch: str
) -> None:
    """Check that a prompt's pieces, encoded one by one, are the tokens of the prompt.

    Raises:
        UserError: if they are not; the model would be asked otherwise than it was trained.
    """
    whole = base(f"{prefix}{image}{branch}", add_special_tokens=False)["input_ids"]
    pieces: list[int] = []
    for piece in (prefix, image, branch):
        pieces += base(piece, add_special_tokens=False)["input_ids"]
    if pieces != whole:
        raise UserError(
            f"{_SETTING} image_chat: the tokenizer joins words across the image, so its prompts "
            "cannot be written in pieces; set it to chatml or plain"
        )
