"""Write CLIP's own tokenizer as a diffusers folder holds it, from the vocabulary that open-clip-torch ships."""

from __future__ import annotations

import gzip
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY_SIZE = 49408


def write_tokenizer(folder: Path) -> None:
    """Make `vocab.json`, `merges.txt` and the configs in `folder`, byte for byte CLIP's vocabulary."""
    package = find_spec("open_clip")  # found, not imported: importing it needs torchvision
    if package is None or package.origin is None:
        raise ModuleNotFoundError("CLIP's vocabulary comes with open-clip-torch: pip install --no-deps open-clip-torch")
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    # The file goes on beyond what CLIP uses: 256 bytes, each also as a word's end, then merges, then two specials.
    merges = lines[1 : VOCABULARY_SIZE - 512 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    if len(tokens) != VOCABULARY_SIZE:
        raise ValueError(f"the vocabulary has {len(tokens)} tokens; CLIP's has {VOCABULARY_SIZE}")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
