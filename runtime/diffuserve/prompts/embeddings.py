"""Textual inversion: a folder of embeddings, each a word that stands for vectors of its own (Gal et al. 2022).

A file's name is the word that stands for it in prompts, also as `<name>`; see `named_files`. Files are read again when
they have changed, and parsed within limits.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from diffuserve.errors import InvalidArgumentError
from diffuserve.named_files import NAME, NamedFiles, Seen, seen

__all__ = ["MAX_BYTES", "MAX_VALUE", "MAX_VECTORS", "Embedding", "EmbeddingFolder", "Width"]

#: 75 vectors of both of SDXL's encoders take 600 kB in float32.
MAX_BYTES: Final = 2 << 20
MAX_VECTORS: Final = 75  # they stay in one window of the text encoder
#: A text encoder's own vectors are below 1.
MAX_VALUE: Final = 1000.0

_BEGINS: Final = re.compile(r"\b\w")
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_KEPT: Final = 256  # parsed files


@dataclass(frozen=True, slots=True)
class Width:
    """What one text encoder takes: vectors of `width`, in files with several tensors under `key`."""

    encoder: str
    width: int
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A parsed file. `vectors` [n, D] float32, by their names in it; `first` is the number of its first vector.

    Numbers are never given twice, so they tell the contents of one file from those of another, and from its own before
    it changed.
    """

    name: str
    digest: str
    vectors: Mapping[str, torch.Tensor]
    first: int

    @property
    def count(self) -> int:
        """How many tokens it takes."""
        return max(map(len, self.vectors.values()))

    def of(self, widths: tuple[Width, ...], input_name: str) -> dict[str, torch.Tensor]:
        """Its vectors by text encoder. Raises InvalidArgumentError where they do not fit the checkpoint."""
        if len(widths) == 1:
            found = dict(zip(widths, self.vectors.values(), strict=False)) if len(self.vectors) == 1 else {}
        else:
            found = {one: self.vectors[one.key] for one in widths if one.key in self.vectors}
        if len(found) < len(widths) or any(one.shape[1] != width.width for width, one in found.items()):
            has = _listed_widths({key: one.shape[1] for key, one in self.vectors.items()})
            takes = _listed_widths({one.key: one.width for one in widths})
            raise InvalidArgumentError(
                f"the embedding {self.name} has vectors of width {has}, and this checkpoint takes {takes}; use one "
                "that was made for its kind, or leave the word out",
                input=input_name,
                embedding=self.name,
                width=has,
                expected=takes,
            )
        return {width.encoder: one for width, one in found.items()}


def _listed_widths(widths: Mapping[str, int]) -> str:
    named = len(widths) > 1
    return " and ".join(f"{width} ({key[:64]})" if named else str(width) for key, width in widths.items())


#: By their words in lower case.
_Files = Mapping[str, list[Path]]


class EmbeddingFolder:
    """The embeddings below `root`, which need not exist. Safe to call from several threads."""

    def __init__(self, root: Path) -> None:
        self._files = NamedFiles(root, MAX_BYTES)
        self._lock = threading.Lock()
        self._parsed: OrderedDict[Path, tuple[Seen, Embedding]] = OrderedDict()
        self._next = 0

    def split(self, texts: Sequence[str], checkpoint: str, input_name: str) -> list[list[str | Embedding]]:
        """Each text with its embeddings' words taken out; of several that begin at one place, the longest.

        A word begins and ends where no letter, digit or underscore stands beside it; upper case is as good as lower.
        Raises InvalidArgumentError for a word whose file cannot be used.
        """
        with self._lock:
            files = self._files.of(checkpoint)
            return [self._split(text, files, input_name) if files else [text] for text in texts]

    def _split(self, text: str, files: _Files, input_name: str) -> list[str | Embedding]:
        pieces, end = list[str | Embedding](), 0
        for start, stop, paths in _words(text, files):
            pieces += [text[end:start], self._read(paths, input_name)]
            end = stop
        return [*pieces, text[end:]]

    def _read(self, paths: list[Path], input_name: str) -> Embedding:
        path = paths[0]
        try:
            path = self._files.chosen(paths)
            found = seen(path.stat())
            known = self._parsed.get(path)
            if known is None or known[0] != found:
                found, content = self._files.content(path)
                known = self._parsed[path] = found, self._embedding(path, content, known)
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            raise _unusable(path, reason, input_name) from error
        self._parsed.move_to_end(path)
        while len(self._parsed) > _KEPT:
            self._parsed.popitem(last=False)
        return known[1]

    def _embedding(self, path: Path, content: bytes, known: tuple[Seen, Embedding] | None) -> Embedding:
        digest = hashlib.sha256(content).hexdigest()
        if known is not None and known[1].digest == digest:
            return known[1]
        vectors = _parsed(content)
        embedding = Embedding(path.stem, digest, vectors, self._next)
        self._next += embedding.count
        return embedding


def _words(text: str, files: _Files) -> Iterator[tuple[int, int, list[Path]]]:
    """Where the words of embeddings begin and end, and their files."""
    end = 0
    for begin in _BEGINS.finditer(text):
        start = begin.start()
        run = NAME.match(text, start) if start >= end else None
        if run is None:
            continue
        for stop in range(run.end(), start, -1):
            is_whole = text[stop - 1] not in ".-" and not _is_letter(text[stop : stop + 1])
            if is_whole and (paths := files.get(text[start:stop].lower())):
                in_brackets = text[start - 1 : start] == "<" and text[stop : stop + 1] == ">"
                start, end = (start - 1, stop + 1) if in_brackets else (start, stop)
                yield start, end, paths
                break


def _is_letter(character: str) -> bool:
    return bool(re.match(r"\w", character))


def _parsed(content: bytes) -> dict[str, torch.Tensor]:
    """Its tensors as [n, D] float32. Raises ValueError with what is wrong with the file."""
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError, and others for what its header may say
        raise ValueError(f"is no safetensors file ({error})") from error
    if not 1 <= len(tensors) <= 2:
        raise ValueError(f"has {len(tensors)} tensors, and must have vectors alone: one tensor, or clip_l and clip_g")
    vectors = {}
    for key, tensor in sorted(tensors.items()):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"has values in {tensor.dtype}, and float32, float16 and bfloat16 are read")
        rows = tensor[None] if tensor.ndim == 1 else tensor
        if rows.ndim != 2 or not rows.numel():
            raise ValueError(f"has a tensor of shape {list(tensor.shape)}, and must have [vectors, width]")
        if len(rows) > MAX_VECTORS:
            raise ValueError(f"has {len(rows)} vectors, and at most {MAX_VECTORS} are read")
        vectors[key] = rows.to(torch.float32, copy=True)
        if not vectors[key].abs().max() <= MAX_VALUE:  # written so that a NaN fails
            raise ValueError(f"has values that are not finite, or beyond {MAX_VALUE:g}")
    if len({len(one) for one in vectors.values()}) > 1:
        counts = " and ".join(f"{len(one)} vectors in {key[:64]}" for key, one in vectors.items())
        raise ValueError(f"has {counts}, and must have as many of each")
    return vectors


def _unusable(path: Path, reason: str, input_name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{input_name} names the embedding {path.stem}, and {path.name} {reason}; or leave the word out",
        input=input_name,
        embedding=path.stem,
    )
