"""Text to ids and back, with the mask placeholders ``<MSK_k>`` as ids of our own behind the tokenizer's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annexe import prompts
from annexe.errors import UserError

PLACEHOLDER = re.compile(r"<MSK_(\d+)>")
BPE_VOCABULARY = 1024
TEMPLATE_TOKENS = ("[INST]", "[/INST]", "<Img>", "</Img>", "[caption]", "[vqa]")


class TextTokenizer:
    """A Hugging Face tokenizer plus ``num_slots`` mask placeholders.

    Placeholder k has id ``vocab_size + k``: the base vocabulary, and with it the language model's tables, stay as they
    are. ``vocab_size`` is for tables with more rows than the tokenizer has words. Text around placeholders is encoded
    piece by piece, so that it decodes the same for every tokenizer.
    """

    def __init__(
        self, base: PreTrainedTokenizerBase, num_slots: int, vocab_size: int | None = None
    ) -> None:
        self.base, self.num_slots, self.vocab_size = (
            base,
            num_slots,
            max(len(base), vocab_size or 0),
        )
        self.bos_id, self.eos_id = base.bos_token_id, base.eos_token_id
        self.full_stop_id = self.encode(".")[0]  # as it stands behind a placeholder

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no special tokens added."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, by one call of the tokenizer."""
        split = [PLACEHOLDER.split(text) for text in texts]  # text, k, text, k, ..., text
        pieces = {
            piece if len(parts) == 1 else piece.strip(): None
            for parts in split
            for piece in parts[::2]
        }
        known = [piece for piece in pieces if piece]
        ids = (
            dict(zip(known, self.base(known, add_special_tokens=False)["input_ids"], strict=True))
            if known
            else {}
        )
        return [self._joined(parts, ids) for parts in split]

    def _joined(self, parts: list[str], ids: dict[str, list[int]]) -> list[int]:
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
        """Text of ``ids`` up to the first end-of-sequence."""
        pieces: list[str] = []
        run: list[int] = []
        for token in [*ids, self.eos_id]:
            if token == self.eos_id or token >= self.vocab_size:
                pieces.append(self.base.decode(run, skip_special_tokens=True).strip())
                run = []
            if token == self.eos_id:
                break
            if token >= self.vocab_size:
                pieces.append(f"<MSK_{token - self.vocab_size}>")
            else:
                run.append(token)
        return re.sub(r" ([.,;:?!])", r"\1", " ".join(filter(None, pieces)))

    def save(self, folder: Path) -> None:
        self.base.save_pretrained(folder)


def load_tokenizer(
    folder: str | Path, num_slots: int, vocab_size: int | None = None
) -> TextTokenizer:
    """Load the tokenizer in a Hugging Face folder.

    Raises:
        UserError: if there is none.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"no folder '{folder}' with a tokenizer; set model.language_model.path to Llama's folder"
        )
    for name in (
        "tokenizer_config.json",
        "tokenizer.json",
    ):  # built from tokenizer.model alone, spaces merge otherwise
        if not (Path(folder) / name).is_file():
            raise UserError(
                f"no tokenizer in '{folder}' ({name} is missing); give a whole Hugging Face folder"
            )
    return TextTokenizer(AutoTokenizer.from_pretrained(str(folder)), num_slots, vocab_size)


def train_tokenizer(texts: Iterable[str], num_slots: int) -> TextTokenizer:
    """Train a small byte-level BPE on ``texts`` and those of the prompts, for runs that have no Llama tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in TEMPLATE_TOKENS]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted({*texts, *prompts.texts()})  # each once, in one order
    tokenizer.train_from_iterator((PLACEHOLDER.sub("", text) for text in texts), trainer)
    base = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    return TextTokenizer(base, num_slots)
