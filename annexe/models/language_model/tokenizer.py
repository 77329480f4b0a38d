"""Text to ids and back; the mask placeholders ``<MSK_k>`` are ids behind the tokenizer's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annexe import prompts
from annexe.checkpoints.tensor_files import read_config, require_real_files
from annexe.errors import UserError, require_sizes
from annexe.models.language_model.prompt_templates import find_template
from annexe.prompts import MINIGPT_V2, PromptTemplate

PLACEHOLDER = re.compile(r"<MSK_(\d+)>")
# Words of a tokenizer that is trained here: the bytes, and what short prompts and answers repeat.
BPE_VOCABULARY = 1024
# Parts of MiniGPT-v2's prompt that are a token each in a tokenizer that is trained here.
TEMPLATE_TOKENS = ("[INST]", "[/INST]", "<Img>", "</Img>", "[caption]", "[vqa]")


class TextTokenizer:
    """A Hugging Face tokenizer plus ``num_slots`` mask placeholders.

    Placeholder k has the id ``vocab_size + k``. The base vocabulary, and with it the tables of the
    language model, stay as they are. Text around placeholders is encoded piece by piece, so that it
    decodes the same for every tokenizer.

    Args:
        base: the tokenizer.
        num_slots: number of placeholders.
        vocab_size: rows of the language model's tables, where those exceed the words of ``base``.
        template: how prompts are written.

    Attributes:
        prefix_ids: what stands before the image tokens of every prompt.
        eos_id: what ends a response.
        special_words: words that stand for more than their letters, such as an image token.

    Raises:
        UserError: for less than one placeholder.
    """

    def __init__(
        self,
        base: PreTrainedTokenizerBase,
        num_slots: int,
        vocab_size: int | None = None,
        template: PromptTemplate = MINIGPT_V2,
    ) -> None:
        require_sizes("model.pixel_decoder", num_slots=num_slots)
        self.base = base
        self.template = template
        self.num_slots = num_slots
        # More ids than words, if ids have gaps
        num_ids = max(base.get_vocab().values(), default=-1) + 1
        self.vocab_size = max(len(base), num_ids, vocab_size or 0)
        self.bos_id = base.bos_token_id
        self.eos_id = base.eos_token_id
        if template.end is not None:
            self.eos_id = base.convert_tokens_to_ids(template.end)
        added = base.added_tokens_decoder.values()
        self.special_words = [token.content for token in added if token.special]
        self.full_stop_id = self.encode(".")[0]  # as it stands behind a placeholder
        self.prefix_ids = self.encode(template.prefix)
        if template.begins_with_bos:
            self.prefix_ids.insert(0, self.bos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens, by one call of the tokenizer.

        A placeholder that is not one of ``num_slots`` is left out.
        """
        # Split at the placeholders, into text, k, text, k, ..., text.
        split_texts = [PLACEHOLDER.split(text) for text in texts]
        pieces: dict[str, None] = {}  # each once, in order
        for parts in split_texts:
            if len(parts) == 1:
                pieces[parts[0]] = None
            else:
                pieces.update((part.strip(), None) for part in parts[::2])
        pieces.pop("", None)

        # Encode all pieces of text at once.
        ids: dict[str, list[int]] = {}
        if pieces:
            encoded = self.base(list(pieces), add_special_tokens=False)["input_ids"]
            ids = dict(zip(pieces, encoded, strict=True))
        return [self._join(parts, ids) for parts in split_texts]

    def _join(self, parts: list[str], ids: dict[str, list[int]]) -> list[int]:
        """Ids of one text from its ``parts`` (text, k, text, ...) and the ids of every piece."""
        if len(parts) == 1:
            return list(ids.get(parts[0], ()))
        joined: list[int] = []
        for position, part in enumerate(parts):
            if position % 2 == 0:
                joined += ids.get(part.strip(), ())
            elif int(part) < self.num_slots:
                joined.append(self.vocab_size + int(part))
        return joined

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` up to the first end of sequence, with placeholders as ``<MSK_k>``."""
        pieces: list[str] = []
        words: list[int] = []  # ids since the last placeholder
        for token in [*ids, self.eos_id]:
            if token == self.eos_id or token >= self.vocab_size:
                text = self.base.decode(words, skip_special_tokens=True)
                assert isinstance(text, str)
                pieces.append(text.strip())
                words = []
            if token == self.eos_id:
                break
            if token >= self.vocab_size:
                pieces.append(f"<MSK_{token - self.vocab_size}>")
            else:
                words.append(token)

        # Punctuation follows a placeholder without a space.
        return re.sub(r" ([.,;:?!])", r"\1", " ".join(filter(None, pieces)))

    def save(self, folder: Path) -> None:
        """Write the tokenizer as a Hugging Face folder, without the placeholders."""
        self.base.save_pretrained(folder)


def load_tokenizer(
    folder: str | Path,
    num_slots: int,
    vocab_size: int | None = None,
    prompt_template: str = "minigpt_v2",
) -> TextTokenizer:
    """Load the tokenizer in a Hugging Face folder.

    Args:
        folder: the folder.
        num_slots: number of placeholders.
        vocab_size: as of `TextTokenizer`.
        prompt_template: name of a template of `annexe.models.language_model.prompt_templates`.

    Raises:
        UserError: if there is none, or it is damaged or cannot begin and end a text, or has no
            words for the template.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"no folder '{folder}' with a tokenizer; "
            "set model.language_model.path to the folder of a language model"
        )
    # From tokenizer.model alone transformers would build one that merges spaces differently.
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not (Path(folder) / name).is_file():
            raise UserError(
                f"no tokenizer in '{folder}' ({name} is missing); "
                "give a complete Hugging Face folder"
            )

    # The library looks into config.json, too. It raises whatever it likes for damaged files.
    require_real_files(Path(folder))
    read_config(folder)
    try:
        base = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the tokenizer in '{folder}' ({type(error).__name__}: {reason}); "
            "fetch its JSON files again"
        ) from None
    template = find_template(prompt_template, base)
    _require_special_tokens(base, folder, template)
    return TextTokenizer(base, num_slots, vocab_size, template)


def _require_special_tokens(
    base: PreTrainedTokenizerBase, folder: str | Path, template: PromptTemplate
) -> None:
    """Check that a tokenizer can begin a prompt, end a response and write a full stop.

    Raises:
        UserError: for one that cannot.
    """
    needed = [("bos_token", "begin a prompt")] if template.begins_with_bos else []
    needed += [("eos_token", "end a response")]
    for name, does in needed:
        if getattr(base, name) is None:
            raise UserError(
                f"the tokenizer in '{folder}' has no {name}, so it cannot {does}; set {name} in "
                "its tokenizer_config.json to the word that the model was trained with, such as "
                f"'{'<s>' if name == 'bos_token' else '</s>'}' for Llama 2, or choose another "
                "model.language_model.prompt_template"
            )
    if not base(".", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"the tokenizer in '{folder}' has no word for a full stop, so it is not that of a "
            "language model; fetch its tokenizer.json again"
        )


def train_tokenizer(texts: Iterable[str], num_slots: int) -> TextTokenizer:
    """Train a small byte-level BPE, for runs that have no tokenizer.

    Args:
        texts: texts to train on, besides those of the prompts. Their order does not matter.
        num_slots: number of placeholders.

    Returns:
        The tokenizer.
    """
    # Set up the tokenizer; template tokens swallow the spaces around them.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    template_tokens = [
        AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in TEMPLATE_TOKENS
    ]
    tokenizer.add_tokens(template_tokens)

    # Train it on every text once, in an order that does not depend on the caller.
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    distinct_texts = sorted({*texts, *prompts.texts()})
    tokenizer.train_from_iterator((PLACEHOLDER.sub("", text) for text in distinct_texts), trainer)

    # Wrap it for transformers.
    base = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    return TextTokenizer(base, num_slots)
