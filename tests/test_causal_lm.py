"""Language models of any family and prompt templates, against transformers' own way."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.inference.predictor import check_question
from annexe.models.language_model.prompt_templates import find_template
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def byte_tokenizer(words: list[str], **settings: object) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and some special words, with tokenizer.json alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    base.add_special_tokens({"additional_special_tokens": words})
    return base


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    """A tokenizer of a chat model, without a beginning of sequence."""
    folder = tmp_path_factory.mktemp("chat")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    base = byte_tokenizer(words, eos_token="<|endoftext|>")
    base.chat_template = CHATML
    base.save_pretrained(folder)
    return folder


# --- Prompt templates -----------------------------------------------------------------------------


def test_a_chat_template_is_split_around_image_and_task(chat_folder):
    split = load_tokenizer(chat_folder, 4, None, "auto")
    written = load_tokenizer(chat_folder, 4, None, "chatml")
    assert split.template == written.template
    assert split.eos_id == split.base.convert_tokens_to_ids("<|im_end|>") != split.base.eos_token_id

    # Its words around an image are those of a conversation
    messages = [{"role": "user", "content": "\nName and locate: the mug"}]
    whole = split.base.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    task = split.encode(split.template.query_prompt("the mug"))
    assert split.base.decode(split.prefix_ids + task) == whole


def test_llama_3_is_asked_as_its_own_template_does():
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    base = byte_tokenizer(words, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    base.chat_template = LLAMA3
    by_name = TextTokenizer(base, 4, None, find_template("llama3", base))
    split = TextTokenizer(base, 4, None, find_template("auto", base))
    assert by_name.prefix_ids == split.prefix_ids
    assert by_name.template.query == split.template.query
    assert by_name.eos_id == split.eos_id


@pytest.mark.parametrize("name", ["chatml", "auto", "plain"])
def test_prompts_are_the_same_tokens_in_training_and_generation(chat_folder, make_parts, name):
    _, _, batch = make_parts(num_images=2)
    tokenizer = load_tokenizer(chat_folder, 4, None, name)
    trained = Collator(tokenizer, 4, 4)(batch.samples).text
    asked = Collator(tokenizer, 4, 4, responses=False)(batch.samples).text
    assert trained.prefix_length == asked.prefix_length == len(tokenizer.prefix_ids) + 4
    rows = zip(trained.branch_image_index.tolist(), trained.branch_length.tolist(), strict=True)
    for branch, (row, length) in enumerate(rows):
        prompts = []
        for text in (trained, asked):
            start = int(text.branch_start[branch])
            prompts.append(text.input_ids[row, start : start + length].tolist())
        assert prompts[0] == prompts[1]
    ends = trained.labels == tokenizer.eos_id
    assert int(ends.sum()) == len(trained.branch_start)


def test_templates_that_do_not_fit_a_tokenizer_say_what_does(chat_folder, tmp_path):
    for name, message in {
        "llama3": "'<\\|eot_id\\|>', which the tokenizer does not know",
        "minigpt_v2": "has no bos_token, so it cannot begin a prompt",
        "vicuna": "prompt_template",
    }.items():
        with pytest.raises(UserError, match=message):
            load_tokenizer(chat_folder, 4, None, name)
    base = load_tokenizer(chat_folder, 4, None, "plain").base
    for template, message in {
        None: "it has none",
        "{{ raise_exception('no') }}": "cannot apply",
        "{{ messages[0].role }}": "leaves out what it is given",
    }.items():
        base.chat_template = template
        folder = tmp_path / str(len(message))
        base.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder, 4, None, "auto")


def test_a_question_cannot_end_the_prompt():
    with pytest.raises(UserError, match="holds a token of the prompt"):
        check_question("the mug<|im_end|>")
