"""What a picture's file says of how the picture was made.

A picture from a client holds two texts: the web UIs' (see infotext), and a record in JSON, which is complete:

    {"diffuserve": "0.1.0", "parameters": {"prompt": "a red circle", "seed": 7, ...},
     "pictures": {"init_image": "<sha256>"}}

`parameters` are GenerateRequest's fields as the server resolved them, so that nothing is left to defaults, and what
else it told of the picture. `pictures` are the digests of the request's pictures, which are not in the file; null
where they are not known, of a request that was resumed from a snapshot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from diffuserve import __version__
from diffuserve.errors import InvalidArgumentError
from diffuserve.metadata.infotext import infotext, parameters_from_infotext
from diffuserve.request import INPUT_PICTURES, GenerateRequest

__all__ = ["Record"]

#: Fields that say how a request is answered, or hold bytes: none of them changes the picture.
_NOT_RECORDED: Final = frozenset(
    {
        *INPUT_PICTURES,
        "resume",
        "progress_every",
        "preview_every",
        "heartbeat_ms",
        "image_encoding",
        "priority",
        "deadline_ms",
        "client_tag",
    }
)
_RECORDED: Final = tuple(one.name for one in fields(GenerateRequest) if one.name not in _NOT_RECORDED)
#: What the server tells beside: it names files, and does not ask for them.
_TOLD: Final = ("alias", "embeddings", "lora_files")
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "Sequence[str]": (list,),
}
_TYPE_OF: Final = {one.name: _TYPES[str(one.type)] for one in fields(GenerateRequest) if one.name in _RECORDED}


def _fits(name: str, value: Any) -> bool:
    """Whether JSON's value is of the field's type; what it may be in that type, GenerateRequest says."""
    if isinstance(value, list) and not all(isinstance(one, str) for one in value):
        return False
    return isinstance(value, _TYPE_OF.get(name, ())) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Record:
    """`parameters`: GenerateRequest's fields by name; `pictures`: input pictures' sha256 by field, None if unknown."""

    parameters: Mapping[str, Any]
    pictures: Mapping[str, str] | None

    @classmethod
    def of(cls, request: GenerateRequest, image_format: str, seed: int, info: Mapping[str, Any]) -> Record:
        """Of one picture: the request, and what the server told of the picture."""
        told = {name: info[name] for name in _TOLD if name in info}
        # A value of the wrong type is a server's mistake, and not a reason to lose the picture.
        told |= {name: info[name] for name in _RECORDED if name in info and _fits(name, info[name])}
        asked = {name: getattr(request, name) for name in _RECORDED}
        of_picture = {"seed": seed, "num_images": 1, "image_format": image_format}
        given = {name: getattr(request, name) for name in INPUT_PICTURES}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in given.items() if data}
        return cls({**asked, **told, **of_picture}, None if request.resume else digests)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError for what no client of this release, or of an earlier one, wrote."""
        try:
            content = json.loads(text)
            version, parameters, pictures = (content[name] for name in ("diffuserve", "parameters", "pictures"))
            known = {name: value for name, value in parameters.items() if name not in _TOLD}
            digests = None if pictures is None else dict(pictures.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its record is damaged") from error
        if not all(isinstance(digest, str) for digest in (digests or {}).values()):
            raise ValueError("its record is damaged")
        if "prompt" not in known:
            raise ValueError("its record has no prompt")
        if strange := sorted({*known, *(digests or ())} - {*_RECORDED, *INPUT_PICTURES}):
            raise ValueError(
                f"it was made by diffuserve {str(version)[:32]}, with {strange[0][:32]!r}, which {__version__} does "
                "not have"
            )
        for name, value in known.items():
            if not _fits(name, value):
                raise ValueError(f"its record says {name}: {str(value)[:32]!r}, which is no value for it")
        return cls(known, digests)

    @classmethod
    def from_infotext(cls, text: str) -> Record:
        """As far as a web UI's text says it. Raises ValueError."""
        return cls(parameters_from_infotext(text), None)

    def to_json(self) -> str:
        told = {"diffuserve": __version__, "parameters": dict(self.parameters), "pictures": self.pictures}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))

    def to_infotext(self) -> str:
        return infotext(self.parameters, begins_with_picture="init_image" in (self.pictures or {}))

    def request(self, **pictures: bytes) -> GenerateRequest:
        """The request for the same picture again.

        Raises InvalidArgumentError where an input picture is missing, or is another one.
        """
        for name in self.missing(pictures):
            raise InvalidArgumentError(
                f"it was made with {name}, a picture that is not in the file; give it as well (its sha256 is "
                f"{str((self.pictures or {})[name])[:64]})",
                input=name,
            )
        if strange := self.strangers(pictures):
            raise InvalidArgumentError(
                f"{strange[0]} is not the picture that it was made with; give that one, or make a new request",
                input=strange[0],
            )
        return GenerateRequest(**{**self.parameters, **pictures})

    def missing(self, pictures: Mapping[str, bytes]) -> tuple[str, ...]:
        """The input pictures that it was made with and that are not given."""
        return tuple(name for name in self.pictures or () if not pictures.get(name))

    def strangers(self, pictures: Mapping[str, bytes]) -> tuple[str, ...]:
        """Those of the input pictures that it was not made with; none where that is not known."""
        if self.pictures is None:
            return ()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items() if data}
        return tuple(name for name, digest in digests.items() if self.pictures.get(name) != digest)
