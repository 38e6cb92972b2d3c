"""The registry of LoRAs: a folder of files, held in memory by recency within a budget, and what requests make of them.

    name, weight -> a parsed file -> an adapter of one checkpoint: its files' numbers, weighted and stacked

Parsed files are what is held: another weight or combination costs some copying, and no reading. An adapter lives as
long as requests use it, and equal ones share it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from diffuserve.components import input_type
from diffuserve.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from diffuserve.lora.choice import LoraChoice, LoraKey, lora_key, parse_loras
from diffuserve.lora.files import MAX_FILE_BYTES, MAX_HEADER_BYTES, LoraFile, parse_lora_file, parse_lora_header
from diffuserve.lora.layout import LORA
from diffuserve.lora.packing import Adapter, Fitted, Places, Share, packed, required_rank
from diffuserve.manifest import Manifest
from diffuserve.named_files import NamedFiles, Seen, seen
from diffuserve.telemetry import Telemetry

__all__ = ["DEFAULT_BUDGET", "CheckpointLoras", "LoraFolder"]

DEFAULT_BUDGET: Final = 1 << 30
#: A file that was written to so lately may be written to again.
_SETTLED_S: Final = 0.25
_PATIENCE_S: Final = 1.5


class LoraFolder:
    """The files below `root`, which need not exist. Safe to call from several threads.

    `budget` bounds the bytes of parsed files that are held; the file that is asked for may be larger than that.
    """

    def __init__(self, root: Path, budget: int = DEFAULT_BUDGET, telemetry: Telemetry | None = None) -> None:
        self._files = NamedFiles(root, MAX_FILE_BYTES)
        self.budget, self._telemetry = budget, telemetry or Telemetry()
        self._held: OrderedDict[Path, tuple[Seen, LoraFile]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def get(self, name: str, checkpoint: str) -> LoraFile:
        """The file of that name as it is now, read where it is not held.

        Raises NotFoundError, or InvalidArgumentError where it cannot be used.
        """
        paths = self.paths(checkpoint).get(name.lower())
        if not paths:
            raise NotFoundError(
                f"loras names {name}, and there is no {name}.safetensors in the folder of LoRAs; put it there, or "
                "correct the name",
                input="loras",
                lora=name,
            )
        path = paths[0]
        try:
            path = self._files.chosen(paths)
            return self._known(path) or self._read(path)
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            raise unusable(name, path.name, reason) from error

    def paths(self, checkpoint: str) -> Mapping[str, Sequence[Path]]:
        """The files of each name that a request to a checkpoint may give, whatever is in them."""
        with self._lock:
            return self._files.of(checkpoint)

    def header(self, path: Path) -> LoraFile:
        """What a file's header tells of it; see `parse_lora_header`. Raises OSError or ValueError."""
        size, content = self._files.header(path, MAX_HEADER_BYTES)
        return parse_lora_header(content, size)

    def _known(self, path: Path) -> LoraFile | None:
        found = seen(path.stat())
        with self._lock:
            known = self._held.get(path)
            if known is None or known[0] != found:
                return None
            self._held.move_to_end(path)
            total = self._bytes
        self._telemetry.lora(hit=True, held_bytes=total)
        return known[1]

    def _read(self, path: Path) -> LoraFile:
        with self._reading:  # one at a time: a file may be large
            if (known := self._known(path)) is not None:  # another request was waiting for it as well
                return known
            _wait_until_written(path)
            found, content = self._files.content(path)
            file = parse_lora_file(content)
            with self._lock:
                self._let_go(path)
                self._held[path] = found, file
                self._bytes += file.bytes
                while self._bytes > self.budget and self._held:
                    self._let_go(next(iter(self._held)))
                total = self._bytes
        self._telemetry.lora(hit=False, held_bytes=total)
        return file

    def _let_go(self, path: Path) -> None:
        known = self._held.pop(path, None)
        self._bytes -= known[1].bytes if known else 0


def _wait_until_written(path: Path) -> None:
    """Wait while someone writes to the file: one that was given its size first looks whole before it is.

    Raises ValueError where that does not end soon, OSError where the file goes.
    """
    patience = time.monotonic() + _PATIENCE_S
    found = path.stat()
    while abs(time.time() - found.st_mtime) < _SETTLED_S:
        if time.monotonic() > patience:
            raise ValueError("is being written; ask again when it is whole")
        time.sleep(_SETTLED_S / 2)  # a writer that is done tells nobody
        found = path.stat()


def unusable(name: str, file: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"loras names {name}, and {file} {reason}; or leave it out", input="loras", lora=name)


class CheckpointLoras:
    """What LoRAs can do to one checkpoint."""

    def __init__(self, manifest: Manifest, folder: LoraFolder) -> None:
        self._checkpoint, self._folder = manifest.name, folder
        parts = {name: one for name, one in manifest.components.items() if one.lora is not None}
        self._layouts = {name: one.lora for name, one in parts.items() if one.lora is not None}
        self._dtypes = {name: dtype for name, one in parts.items() if (dtype := input_type(one, LORA))}
        self._places = Places(self._layouts)
        self._alive: WeakValueDictionary[LoraKey, Adapter] = WeakValueDictionary()
        #: The bytes of one adapter.
        self.bytes = sum(layout.size * self._dtypes[name].itemsize for name, layout in self._layouts.items())

    def read(self, texts: Sequence[str]) -> tuple[dict[str, Any], ...]:
        """What `info` tells of a request's LoRAs: each one's name, weight, rank and its file's digest.

        Raises NotFoundError, UnsupportedError, or InvalidArgumentError where they cannot be used together here.
        """
        choices = parse_loras(texts)
        if choices and not self._layouts:
            raise UnsupportedError(
                f"{self._checkpoint} was exported without adapters, and loras is given; export it with a LORA_RANK, or "
                "leave them out",
                input="loras",
            )
        files = [self._folder.get(one.name, self._checkpoint) for one in choices]
        fitted = [self._fit(choice, file) for choice, file in zip(choices, files, strict=True)]
        self._check_rank(choices, fitted)
        return tuple(
            {
                "name": choice.name,
                "weight": choice.weight,
                "truncated": choice.is_truncated,
                "rank": max(module.rank for module in file.modules.values()),
                "digest": file.digest,
            }
            for choice, file in zip(choices, files, strict=True)
        )

    @property
    def rank(self) -> int:
        """What there is room for in every layer; 0 where the checkpoint takes no adapters."""
        return min((layout.rank for layout in self._layouts.values()), default=0)

    def required_rank(self, file: LoraFile) -> int:
        """The rank that a file needs on its own. Raises ValueError where it was made for other layers."""
        share = Share(self._places.fit(file), 1.0, is_truncated=False)
        return max(required_rank([share], layout, component) for component, layout in self._layouts.items())

    def _fit(self, choice: LoraChoice, file: LoraFile) -> Fitted:
        try:
            return self._places.fit(file)
        except ValueError as error:
            raise unusable(choice.name, "it", f"does not fit {self._checkpoint}: it {error}") from error

    def _check_rank(self, choices: Sequence[LoraChoice], fitted: Sequence[Fitted]) -> None:
        shares = [Share(one, 1.0, choice.is_truncated) for choice, one in zip(choices, fitted, strict=True)]
        for component, layout in self._layouts.items():
            needed = required_rank(shares, layout, component)
            if needed > layout.rank:
                raise InvalidArgumentError(
                    f"loras {', '.join(one.name for one in choices)} need a rank of {needed} together, and "
                    f"{component} of {self._checkpoint} was exported with {layout.rank}; ask for fewer, let one be "
                    f"truncated ({choices[-1].name}:{choices[-1].weight:g}:truncate), or export with a higher rank",
                    input="loras",
                    value=needed,
                    maximum=layout.rank,
                )

    def adapter(self, files: Sequence[Mapping[str, Any]]) -> Adapter | None:
        """The adapter of what `read` told, which equal requests share; None where there is nothing to add.

        Raises InvalidArgumentError where a file is another one by now.
        """
        key = lora_key(files)
        if not key:
            return None
        adapter = self._alive.get(key)
        if adapter is None:
            adapter = self._alive[key] = self._packed(key, [one for one in files if one["weight"]])
        return adapter

    def _packed(self, key: LoraKey, files: Sequence[Mapping[str, Any]]) -> Adapter:
        shares, names = list[Share](), ", ".join(one["name"] for one in files)
        for one in files:
            file = self._folder.get(one["name"], self._checkpoint)
            if file.digest != one["digest"]:
                raise unusable(one["name"], "its file", "changed while the request waited; send it again")
            shares.append(Share(self._places.fit(file), one["weight"], one["truncated"]))
        try:
            return packed(key, shares, self._layouts, self._dtypes)
        except ValueError as error:
            raise unusable(names, "it", str(error)) from error
