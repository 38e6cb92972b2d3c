"""A request's prompts -> what its text encoders read, in windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import torch

from diffuserve.errors import InvalidArgumentError
from diffuserve.manifest import Manifest
from diffuserve.prompts.embeddings import Embedding, EmbeddingFolder, Width
from diffuserve.prompts.syntax import parse_a1111, parse_plain
from diffuserve.prompts.windows import COMMA_BACKTRACK, PromptTokenizer, Token, Unit, Window, windows
from diffuserve.request import ResolvedRequest
from diffuserve.spec import EMBEDDINGS

__all__ = ["PromptReader", "Reading", "Text"]

_A1111: Final = "a1111"

#: Text and embeddings in their order, and the weight of all; None is a BREAK.
_Pieces = tuple[float, list[str | Embedding]] | None


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One prompt: its windows by text encoder, as many in each, and how many of their layers are left out."""

    windows: Mapping[str, tuple[Window, ...]]
    clip_skip: int


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A request's prompts.

    rows        what each of the request's rows is told, all in as many windows; None stands for zeros
    chunks      how many windows that is
    embeddings  the names and digests of the textual inversions in them
    vectors     of these, by text encoder and token id: [D] float32
    """

    rows: tuple[Text | None, ...]
    chunks: int
    embeddings: tuple[str, ...]
    vectors: Mapping[str, Mapping[int, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Encoder:
    name: str
    tokenizer: PromptTokenizer
    vocabulary: int


class PromptReader:
    """Reads the prompts of one checkpoint's requests. `folder` is the manifest's.

    Raises OSError or ValueError where a tokenizer cannot be read.
    """

    def __init__(self, manifest: Manifest, folder: Path, embeddings: EmbeddingFolder) -> None:
        how = manifest.conditioning
        self._checkpoint, self._how, self._embeddings = manifest.name, how, embeddings
        self._encoders = tuple(
            _Encoder(one.component, PromptTokenizer(folder / one.tokenizer, manifest.token_limit), one.vocabulary)
            for one in how.encoders
        )
        self._widths = tuple(
            Width(one.component, _width(manifest, one.component), one.embedding_key) for one in how.encoders
        )

    def __call__(self, resolved: ResolvedRequest) -> Reading:
        """Raises InvalidArgumentError or UnsupportedError for a prompt that is too long, or cannot be read."""
        request, used = resolved.request, dict[int, Embedding]()
        read = [self._windows("prompt", request.prompt, request.prompt_syntax, used)]
        # diffusers leaves layers out for the prompt alone, A1111 for both.
        skipped = [request.clip_skip, request.clip_skip if request.prompt_syntax == _A1111 else 0]
        if resolved.rows == 2 and (request.negative_prompt or not self._how.zero_empty_negative):
            read.append(self._windows("negative_prompt", request.negative_prompt, request.prompt_syntax, used))
        longest = max(len(one) for windows_of in read for one in windows_of.values())
        chunks = next(count for count in self._how.chunks if count >= longest)
        rows = [Text(self._filled(one, chunks), skip) for one, skip in zip(read, skipped, strict=False)]
        zeros = [None] * (resolved.rows - len(rows))
        digests = tuple(sorted(f"{one.name}:{one.digest[:16]}" for one in used.values()))
        return Reading((*rows, *zeros), chunks, digests, self._vectors(used))

    def _windows(self, name: str, prompt: str, syntax: str, used: dict[int, Embedding]) -> dict[str, list[list[Token]]]:
        """The prompt's tokens by text encoder and window. The embeddings that it names are added to `used`."""
        is_a1111, is_negative = syntax == _A1111, name == "negative_prompt"
        parts = parse_a1111(prompt, name, is_negative=is_negative) if is_a1111 else parse_plain(prompt)
        spans = [part for part in parts if part is not None]
        found = self._embeddings.split([one.text for one in spans], self._checkpoint, name)
        for embedding in chain.from_iterable(found):
            if isinstance(embedding, Embedding):
                embedding.of(self._widths, name)  # refused here, where the input's name is known
                used[embedding.first] = embedding
        split = iter(found)
        pieces: list[_Pieces] = [None if part is None else (part.weight, next(split)) for part in parts]
        read = {}
        for encoder in self._encoders:
            units = (None if one is None else list(_units(encoder, *one)) for one in pieces)
            tokenizer = encoder.tokenizer
            backtrack = COMMA_BACKTRACK if is_a1111 else 0
            read[encoder.name] = windows(units, tokenizer.room, tokenizer.comma, backtrack)
            self._check_length(name, len(read[encoder.name]), tokenizer.room)
        return read

    def _check_length(self, name: str, count: int, room: int) -> None:
        most = self._how.chunks[-1]
        if count > most:
            raise InvalidArgumentError(
                f"{name} takes {count} windows of {room} tokens, and at most {most} are read, {most * room} tokens; "
                "shorten it",
                input=name,
                value=count,
                maximum=most,
            )

    def _filled(self, read: Mapping[str, list[list[Token]]], chunks: int) -> dict[str, tuple[Window, ...]]:
        """As many windows for every encoder, with empty ones at the end: as A1111 fills up the prompts of a batch."""
        filled = {}
        for encoder in self._encoders:
            tokens = read[encoder.name]
            empty = [list[Token]()] * (chunks - len(tokens))
            filled[encoder.name] = tuple(map(encoder.tokenizer.window, [*tokens, *empty]))
        return filled

    def _vectors(self, used: Mapping[int, Embedding]) -> dict[str, dict[int, torch.Tensor]]:
        vectors: dict[str, dict[int, torch.Tensor]] = {encoder.name: {} for encoder in self._encoders}
        for one in used.values():
            for encoder in self._encoders:
                theirs = one.of(self._widths, "prompt")[encoder.name]
                vectors[encoder.name] |= dict(enumerate(theirs, start=encoder.vocabulary + one.first))
        return vectors


def _units(encoder: _Encoder, weight: float, pieces: Sequence[str | Embedding]) -> Iterator[Unit]:
    for piece in pieces:
        if isinstance(piece, Embedding):
            first = encoder.vocabulary + piece.first
            yield [Token(first + number, weight) for number in range(piece.count)]
        else:
            yield from ([Token(one, weight)] for one in encoder.tokenizer.ids(piece))


def _width(manifest: Manifest, component: str) -> int:
    """What the component's input for textual inversions takes. Raises ValueError where it has none."""
    for one in manifest.components[component].inputs:
        if one.name == EMBEDDINGS:
            return int(one.shape[-1])
    raise ValueError(f"{component} of {manifest.name} has no input {EMBEDDINGS}; export it again with this version")
