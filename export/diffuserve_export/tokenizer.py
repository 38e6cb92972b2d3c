"""The checkpoint's tokenizer as one file for the `tokenizers` library, so that a server needs no transformers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import CheckpointError
from diffuserve_export.sources import ARCHITECTURES

__all__ = ["clip_tokenizer", "tokenizer_file", "tokenizer_from_checkpoint"]


def tokenizer_file(encoder: str) -> str:
    """The name of an encoder's tokenizer beside the manifest."""
    return f"{encoder.replace('text_encoder', 'tokenizer')}.json"


def tokenizer_from_checkpoint(checkpoint: Checkpoint, encoder: str, path: Path) -> Path:
    """Write the tokenizer of a text encoder to `path`.

    It pads and truncates to the text encoder's length by itself, as CLIPTokenizer does when asked for
    `padding="max_length", truncation=True`: `Tokenizer.from_file(path).encode(prompt).ids` are the ids to encode.
    Call `no_truncation()` and `no_padding()` on it to see a whole prompt. Raises CheckpointError.
    """
    tokenizer = clip_tokenizer(checkpoint, encoder)
    backend, length = tokenizer.backend_tokenizer, checkpoint.token_limit
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token))
    backend.save(str(path))
    return path


def clip_tokenizer(checkpoint: Checkpoint, encoder: str) -> Any:
    """A text encoder's CLIPTokenizer. Raises CheckpointError."""
    folder = checkpoint.tokenizer(encoder)
    try:
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return _from_merges(folder)
    except Exception as error:  # transformers and tokenizers raise all kinds for damaged vocabularies
        raise CheckpointError(f"the {folder.name} of {checkpoint.label} cannot be loaded: {error}") from error


def _from_merges(folder: Path) -> Any:
    """CLIP's vocabulary follows from its merges: the bytes, the bytes that end a word, one token a merge, two marks."""
    lines = gzip.decompress((ARCHITECTURES / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:] if line]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    marks = [config.pop("bos_token"), config.pop("eos_token")]
    vocabulary = {word: number for number, word in enumerate([*words, *marks])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, bos_token=marks[0], eos_token=marks[1], **config)
