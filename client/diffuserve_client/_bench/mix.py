"""What is asked for: requests drawn from a mix, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import GenerateRequest
from diffuserve_client._extras import extra
from diffuserve_client._files import read_limited

__all__ = ["DEFAULT_PROMPTS", "Mix", "read_prompts"]

DEFAULT_PROMPTS: Final = (
    "a large red circle on a blue background",
    "a small green ring on a white background",
    "a lighthouse at dusk, oil painting",
    "a bowl of oranges on a wooden table, soft light",
)
_UNGUIDED: Final = 1.0
_MOST_SEED: Final = 2**32
_MOST_BYTES: Final = 16 * 2**20
_YAML: Final = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Each request takes one of each list, evenly by chance; of an empty list, what the checkpoint or server uses.

    `prompts` are each a prompt and any other of GenerateRequest's fields, which then go before the lists. A share of
    `guided_share` of the requests has `guidance_scale`, the others have no guidance; None: all have `guidance_scale`,
    or where that is None, the checkpoint's own. `fixed` is the same for all requests.

    Raises InvalidArgumentError.
    """

    prompts: Sequence[Mapping[str, Any]]
    steps: Sequence[int] = ()
    samplers: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()
    guided_share: float | None = None
    guidance_scale: float | None = None
    fixed: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InvalidArgumentError("no prompt is given; give one at least", input="prompts")
        if self.guided_share is not None and not 0 <= self.guided_share <= 1:
            raise InvalidArgumentError(
                f"the share of guided requests is {self.guided_share}, and must be from 0 to 1",
                input="guided_share",
                value=str(self.guided_share),
            )
        if self.guided_share and self.guidance_scale is None:
            raise InvalidArgumentError(
                "a share of guided requests is given, and not how strong their guidance is; give --guidance-scale",
                input="guidance_scale",
            )
        self._check_each()

    def _check_each(self) -> None:
        """Every value once: a mistake should be heard of before the load, not in the middle of it."""
        rng = random.Random(0)
        for prompt in self.prompts:
            self._request(rng, prompt)
        lists = {"steps": self.steps, "sampler": self.samplers, "checkpoint": self.checkpoints}
        for name, values in lists.items():
            for value in values:
                self._made({"prompt": "", name: value})
        for width, height in self.sizes:
            self._made({"prompt": "", "width": width, "height": height})

    def requests(self) -> Iterator[GenerateRequest]:
        """The mix's requests, without end; the nth is the same whenever it is asked for."""
        rng = random.Random(self.seed)
        while True:
            yield self._request(rng, rng.choice(self.prompts))

    def _request(self, rng: random.Random, prompt: Mapping[str, Any]) -> GenerateRequest:
        drawn: dict[str, Any] = {"seed": rng.randrange(_MOST_SEED)}
        lists = {"steps": self.steps, "sampler": self.samplers, "checkpoint": self.checkpoints}
        drawn |= {name: rng.choice(values) for name, values in lists.items() if values}
        if self.sizes:
            drawn["width"], drawn["height"] = rng.choice(self.sizes)
        if self.guided_share is not None:
            drawn["guidance_scale"] = self.guidance_scale if rng.random() < self.guided_share else _UNGUIDED
        elif self.guidance_scale is not None:
            drawn["guidance_scale"] = self.guidance_scale
        return self._made({**self.fixed, **drawn, **prompt})

    @staticmethod
    def _made(fields: Mapping[str, Any]) -> GenerateRequest:
        try:
            return GenerateRequest(**fields)
        except (TypeError, AttributeError) as error:  # of a value of another type than the field's
            # Not the fields themselves: of a few aliases YAML makes gigabytes of text.
            raise InvalidArgumentError(
                f"a request with {', '.join(sorted(fields))} cannot be made: {error}; correct it",
                input="prompts",
            ) from error

    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"sizes": [f"{width}x{height}" for width, height in self.sizes]}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """A file of prompts: of text, one a line; of .jsonl, one JSON value a line; of .yaml, a list.

    A value is a prompt, or a mapping of GenerateRequest's fields. Raises InvalidArgumentError, which says where;
    UnsupportedError where YAML is not installed.
    """
    try:
        text = read_limited(path, _MOST_BYTES, "a file of prompts").decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{path} is not UTF-8 (byte {error.start}); correct its encoding", input="prompts"
        ) from error
    if path.suffix.lower() in _YAML:
        values = _yaml(path, text)
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        as_json = path.suffix.lower() == ".jsonl"
        values = [_json(path, number, line) if as_json else line.strip() for number, line in lines]
    if not values:
        raise InvalidArgumentError(f"{path} holds no prompt; give one a line", input="prompts")
    return [_prompt(path, number, value) for number, value in enumerate(values, 1)]


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}, line {number} is no JSON: {error}; correct it", input="prompts") from error


def _yaml(path: Path, text: str) -> list[Any]:
    with extra("tools"):
        import yaml
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is no YAML: {error}; correct it", input="prompts") from error
    if not isinstance(values, list):
        raise InvalidArgumentError(f"{path} holds {type(values).__name__}, and must be a list", input="prompts")
    return values


def _prompt(path: Path, number: int, value: Any) -> dict[str, Any]:
    given = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise InvalidArgumentError(
            f"{path}, prompt {number} is a {type(value).__name__}, and must be a text, or a mapping with a prompt",
            input="prompts",
        )
    known = GenerateRequest(prompt="").parameters()
    if unknown := [name for name in given if name not in known]:
        raise InvalidArgumentError(
            f"{path}, prompt {number} has {str(unknown[0])[:64]!r}, and may have {', '.join(known)}", input="prompts"
        )
    return given
