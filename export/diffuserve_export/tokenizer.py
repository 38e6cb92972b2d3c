"""The checkpoint's tokenizer as one file for the `tokenizers` library, so that a server needs no transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import CheckpointError

__all__ = ["tokenizer_from_checkpoint"]


def tokenizer_from_checkpoint(checkpoint: Checkpoint, path: Path) -> Path:
    """Write `tokenizer.json`.

    It pads and truncates to the text encoder's length by itself, as CLIPTokenizer does when asked for
    `padding="max_length", truncation=True`: `Tokenizer.from_file(path).encode(prompt).ids` are the ids to encode.
    Call `no_truncation()` and `no_padding()` on it to see a whole prompt. Raises CheckpointError.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint.root / "tokenizer", local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise all kinds for damaged vocabularies
        raise CheckpointError(f"the tokenizer of {checkpoint.root} cannot be loaded: {error}") from error
    backend, length = tokenizer.backend_tokenizer, checkpoint.token_limit
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token))
    backend.save(str(path))
    return path
