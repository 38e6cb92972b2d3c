"""Aliases of checkpoints, with weights: a file beside deployment.json that is written anew with every decision.

A request that names an alias gets one of its checkpoints. Which one depends on the request alone, so every server with
the same table decides alike, and of those that had the new version with a small share all have it with a larger one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.written import write_atomically

__all__ = ["Alias", "RolloutTable", "change_table", "check_name", "parse_weights", "read_table"]

MAX_BYTES: Final = 64 << 10
MAX_ALIASES: Final = 64
MAX_TARGETS: Final = 16

_FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_WEIGHT: Final = 1e6
_REMEMBERED: Final = 16
_LOCK_FILE: Final = ".rollout.lock"


@dataclass(frozen=True, slots=True)
class Alias:
    """`weights` of checkpoints, of any sum, in the order that they were given; none is 0.

    `stable` lists, the latest last, which checkpoints had every request before, or came first in the first mixture.
    """

    weights: Mapping[str, float]
    stable: tuple[str, ...]

    @classmethod
    def new(cls, weights: Mapping[str, float]) -> Alias:
        return cls({}, ()).changed(weights)

    def changed(self, weights: Mapping[str, float]) -> Alias:
        """With other weights."""
        first = next(iter(weights))
        is_settled = len(weights) == 1 or not self.stable
        stable = (*self.stable, first) if is_settled and self.stable[-1:] != (first,) else self.stable
        return Alias(dict(weights), stable[-_REMEMBERED:])

    def promoted(self, checkpoint: str) -> Alias:
        """With one of its checkpoints for every request. Raises KeyError where it is none of them."""
        return self.changed({checkpoint: self.weights[checkpoint]})

    def rolled_back(self) -> Alias:
        """With every request for the last stable checkpoint, or the one before where it has them already.

        Raises KeyError where there is none.
        """
        *before, last = self.stable
        if list(self.weights) != [last]:
            return Alias({last: 1.0}, self.stable)
        if not before:
            raise KeyError(last)
        return Alias({before[-1]: 1.0}, tuple(before))

    def shares(self) -> dict[str, float]:
        """Of each checkpoint, from 0 to 1."""
        total = math.fsum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    def choose(self, point: float) -> str:
        """The checkpoint at a point from 0 to 1, where they lie side by side in their order."""
        end = 0.0
        for name, share in self.shares().items():
            end += share
            if point < end:
                return name
        return name  # the shares' sum may be a little below 1


@dataclass(frozen=True, slots=True)
class RolloutTable:
    """`default` is what a request gets that names no checkpoint: an alias or a checkpoint; None: the deployment's."""

    aliases: Mapping[str, Alias] = field(default_factory=dict)
    default: str | None = None

    FILE: ClassVar[str] = "rollout.json"

    def choose(self, name: str | None, key: str) -> tuple[str | None, str | None]:
        """The checkpoint that a request gets which names this, and the alias that it came by, or None.

        `key` is what of the request decides: the same key gets the same checkpoint.
        """
        name = name or self.default
        alias = self.aliases.get(name) if name else None
        if alias is None:
            return name, None
        digest = hashlib.sha256(f"{name}\0{key}".encode()).digest()
        return alias.choose(int.from_bytes(digest[:8], "big") / 2**64), name

    def with_alias(self, name: str, alias: Alias | None) -> RolloutTable:
        """With an alias, or without it, which is then no default either."""
        if alias is not None:
            return replace(self, aliases={**self.aliases, name: alias})
        others = {other: one for other, one in self.aliases.items() if other != name}
        return RolloutTable(others, None if self.default == name else self.default)

    def with_default(self, name: str | None) -> RolloutTable:
        return replace(self, default=name)

    def check(self, checkpoints: Collection[str]) -> None:
        """Raises ValueError where it names something else than these, or gives an alias one of their names."""
        for name, alias in self.aliases.items():
            if name in checkpoints:
                raise ValueError(f"the alias {name} has a checkpoint's name; give it another")
            if missing := [target for target in alias.weights if target not in checkpoints]:
                raise ValueError(f"the alias {name} names {', '.join(missing)}; there are {', '.join(checkpoints)}")
        if self.default is not None and self.default not in self.aliases and self.default not in checkpoints:
            raise ValueError(f"the default {self.default} is neither an alias nor a checkpoint")

    def to_json(self) -> str:
        aliases = {
            name: {"weights": dict(one.weights), "stable": list(one.stable)} for name, one in self.aliases.items()
        }
        return json.dumps({"format_version": _FORMAT, "default": self.default, "aliases": aliases}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RolloutTable:
        """Raises ValueError with what is wrong with the text."""
        try:
            raw = json.loads(text)
            if raw["format_version"] != _FORMAT:
                raise ValueError(f"its format is {raw['format_version']!r}, and {_FORMAT} is read")
            if len(raw["aliases"]) > MAX_ALIASES:
                raise ValueError(f"it has {len(raw['aliases'])} aliases, and at most {MAX_ALIASES} are taken")
            aliases = {check_name(name): _alias(one) for name, one in raw["aliases"].items()}
            return cls(aliases, None if raw["default"] is None else check_name(raw["default"]))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it lacks something, or has something of another kind: {error!r}") from error


def check_name(value: Any) -> str:
    """The name of an alias or a checkpoint. Raises ValueError."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"{str(value)[:80]!r} is no name: letters, digits, '.', '_' and '-', 64 at most, a letter or digit first"
        )
    return value


def parse_weights(text: str) -> tuple[str, dict[str, float]]:
    """An alias and its weights from `shop=shop-v1:90,shop-v2:10`; a checkpoint without a weight has 1.

    Raises InvalidArgumentError.
    """
    name, equals, listed = text.partition("=")
    weights: dict[str, float] = {}
    try:
        for target in listed.split(","):
            checkpoint, colon, weight = target.strip().partition(":")
            if checkpoint in weights:
                raise ValueError(f"{checkpoint} is named twice")
            weights[checkpoint] = float(weight) if colon else 1.0
        if not equals:
            raise ValueError("it has no '='")
        weights = {target: weight for target, weight in weights.items() if weight != 0}
        return check_name(name), _weights(weights)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{text[:200]!r} is no alias with weights ({error}); give one as in shop=shop-v1:90,shop-v2:10"
        ) from error


def read_table(root: Path) -> tuple[RolloutTable, str]:
    """The table of the deployment in `root`, and a digest that tells it from others.

    Where there is none: an empty one, and no digest. Raises OSError or ValueError.
    """
    content = _content(root)
    if content is None:
        return RolloutTable(), ""
    return RolloutTable.from_json(content.decode()), hashlib.sha256(content).hexdigest()[:16]


def _content(root: Path) -> bytes | None:
    try:
        descriptor = os.open(root / RolloutTable.FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


def change_table(
    root: Path, checkpoints: Collection[str], change: Callable[[RolloutTable], RolloutTable]
) -> RolloutTable:
    """Write a deployment's table anew as `change` makes it, whole at once, one change after another.

    Raises InvalidArgumentError where it would name something else than `checkpoints`, or cannot be written.
    """
    path = root / RolloutTable.FILE
    try:
        with _locked(root):
            table = change(read_table(root)[0])
            table.check(checkpoints)
            text = table.to_json()
            RolloutTable.from_json(text)
            write_atomically(path, text)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} stays as it is: {error}") from error
    return table


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / _LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _alias(raw: Any) -> Alias:
    stable = raw["stable"]
    if not isinstance(stable, list) or not 1 <= len(stable) <= _REMEMBERED:
        raise ValueError(f"stable must list 1 to {_REMEMBERED} checkpoints")
    return Alias(_weights(raw["weights"]), tuple(map(check_name, stable)))


def _weights(raw: Any) -> dict[str, float]:
    if not isinstance(raw, dict) or not 1 <= len(raw) <= MAX_TARGETS:
        raise ValueError(f"an alias has 1 to {MAX_TARGETS} checkpoints with a weight above 0")
    for name, weight in raw.items():
        # Written so that NaN fails.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-6 <= weight <= _MAX_WEIGHT:
            raise ValueError(
                f"the weight of {str(name)[:80]!r} is {weight!r}, and must be from 1e-6 to {_MAX_WEIGHT:g}"
            )
    return {check_name(name): float(weight) for name, weight in raw.items()}
