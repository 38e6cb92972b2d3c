"""`storyboard`'s file: scenes, and what they share.

A text file has a prompt on each line; empty lines and those that begin with # are left out. A YAML file:

    style: "{scene}, watercolour"     # around every prompt; without {scene} it comes after it
    negative_prompt: blurry
    seed: 7                           # every scene's, so that what is not said stays alike
    steps: 30
    duration: 1.5                     # seconds
    scenes:
      - a fox at the edge of a wood
      - prompt: the fox crosses a brook
        init: previous                # begin with the picture before
        strength: 0.6
        duration: 3
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import GenerateRequest
from diffuserve_client._extras import extra
from diffuserve_client._files import read_limited

__all__ = ["DEFAULT_DURATION", "MAX_SCENES", "MAX_SECONDS", "Scene", "read_scenes", "scenes_of"]

MAX_BYTES: Final = 256 * 1024
MAX_SCENES: Final = 256
MAX_SECONDS: Final = 900.0  # of the whole film
LEAST_DURATION: Final = 0.02  # seconds; what shows GIFs takes anything shorter for a mistake
DEFAULT_DURATION: Final = 1.0
_PLACE: Final = "{scene}"
_PREVIOUS: Final = "previous"

_WITHOUT_INIT: Final = "give `init: previous` too, or leave it out"

_TEXT: Final = (str, "a text")
_WHOLE: Final = (int, "a whole number")
_NUMBER: Final = ((int, float), "a number")
#: What a scene may say of its own, which the file may say for all of them; and what each must be.
_SHARED: Final[Mapping[str, tuple[Any, str]]] = {
    "negative_prompt": _TEXT,
    "checkpoint": _TEXT,
    "sampler": _TEXT,
    "loras": (list, "a list of texts"),
    "seed": _WHOLE,
    "steps": _WHOLE,
    "guidance_scale": _NUMBER,
    "strength": _NUMBER,
    "duration": _NUMBER,
    "init": _TEXT,
}
_OF_FILE: Final = {"style": _TEXT, "width": _WHOLE, "height": _WHOLE, **_SHARED, "scenes": (list, "a list")}
_OF_SCENE: Final = {"prompt": _TEXT, **_SHARED}


@dataclass(frozen=True)
class Scene:
    """One picture of the film: `duration` in seconds; `from_previous`: it begins with the picture before."""

    prompt: str
    duration: float = DEFAULT_DURATION
    from_previous: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def request(self, previous: bytes = b"") -> GenerateRequest:
        """`previous` is the encoded picture before, where it begins with that. Raises InvalidArgumentError."""
        parameters = dict(self.parameters)
        if not self.from_previous:
            parameters.pop("strength", None)
        return GenerateRequest(prompt=self.prompt, init_image=previous, **parameters)


def read_scenes(path: Path, given: Mapping[str, Any]) -> tuple[Scene, ...]:
    """The scenes of a file. `given` is what the command line says for all of them, which goes before what the file
    says for all of them, and after what it says of one.

    Raises InvalidArgumentError for what cannot be read or meant, UnsupportedError where YAML cannot be read here.
    """
    try:
        text = read_limited(path, MAX_BYTES, "a file of scenes").decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path} is not UTF-8 (byte {error.start}); correct its encoding") from error
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        return scenes_of(_yaml(text) if is_yaml else {"scenes": _lines(text)}, given)
    except InvalidArgumentError as error:
        error.message = f"{path}: {error.message}"
        raise


def scenes_of(content: Any, given: Mapping[str, Any]) -> tuple[Scene, ...]:
    """The scenes that a YAML file's content means. Raises InvalidArgumentError."""
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"it holds no keys; write {', '.join(_OF_FILE)}, each with a colon and its value")
    _check(content, _OF_FILE, "the file")
    listed = content.get("scenes") or []
    if not 1 <= len(listed) <= MAX_SCENES:
        raise InvalidArgumentError(f"it has {len(listed)} scenes, and must have from 1 to {MAX_SCENES}")
    defaults = {name: value for name, value in content.items() if name not in ("style", "scenes")} | dict(given)
    style = content.get("style", _PLACE)
    scenes = tuple(_scene(one, place, defaults, style) for place, one in enumerate(listed, 1))
    if "strength" in defaults and not any(one.from_previous for one in scenes):
        raise InvalidArgumentError(f"strength is given, and no scene begins with the picture before; {_WITHOUT_INIT}")
    seconds = sum(one.duration for one in scenes)
    if seconds > MAX_SECONDS:
        raise InvalidArgumentError(f"the scenes last {seconds:g} s in all, and may last {MAX_SECONDS:g}; shorten some")
    return scenes


def _lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _yaml(text: str) -> Any:
    with extra("tools"):
        import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"it is no YAML: {error}") from error
    except (RecursionError, ValueError) as error:  # of lists in lists, and of a date that is none
        raise InvalidArgumentError("its YAML cannot be read: nested too deep, or a value that is none") from error


def _scene(content: Any, place: int, defaults: Mapping[str, Any], style: str) -> Scene:
    where = f"scene {place}"
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict) or "prompt" not in content:
        raise InvalidArgumentError(f"{where} has no prompt; write a text, or keys with a prompt among them")
    _check(content, _OF_SCENE, where)
    said = {**defaults, **content}
    duration = float(said.pop("duration", DEFAULT_DURATION))
    if not LEAST_DURATION <= duration <= MAX_SECONDS:
        raise InvalidArgumentError(
            f"{where}: duration is {duration:g} s, and must be from {LEAST_DURATION:g} to {MAX_SECONDS:g}"
        )
    init = said.pop("init", "none")
    if init not in (_PREVIOUS, "none"):
        raise InvalidArgumentError(f"{where}: init is {init[:64]!r}, and must be {_PREVIOUS} or none")
    if place == 1 and content.get("init") == _PREVIOUS:
        raise InvalidArgumentError("scene 1 begins with the previous picture, and there is none; leave init out there")
    if "strength" in content and init != _PREVIOUS:
        raise InvalidArgumentError(f"{where} has strength without init; {_WITHOUT_INIT}")
    prompt = said.pop("prompt")
    scene = Scene(_styled(prompt, style), duration, init == _PREVIOUS and place > 1, {"seed": 0, **said})
    try:
        scene.request()
    except InvalidArgumentError as error:
        error.message = f"{where}: {error.message}"
        raise
    return scene


def _styled(prompt: str, style: str) -> str:
    return style.replace(_PLACE, prompt) if _PLACE in style else f"{prompt}, {style}"


def _check(content: Mapping[Any, Any], known: Mapping[str, tuple[Any, str]], where: str) -> None:
    """Raises InvalidArgumentError for a key that is not known, or a value that is not what it must be."""
    for key, value in content.items():
        if key not in known:
            raise InvalidArgumentError(f"{where} has the unknown key {str(key)[:64]!r}; known are {', '.join(known)}")
        kind, said = known[key]
        is_kind = isinstance(value, kind) and not isinstance(value, bool)
        if key == "loras":
            is_kind = is_kind and all(isinstance(one, str) for one in value)
        if isinstance(value, float) and not math.isfinite(value):
            is_kind = False
        if not is_kind:
            # Of a list of lists a few aliases can make gigabytes of text.
            shown = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(str(value)[:64])
            raise InvalidArgumentError(f"{where}: {key} is {shown}, and must be {said}")
