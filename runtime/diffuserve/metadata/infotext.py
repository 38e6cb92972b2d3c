r"""The text by which AUTOMATIC1111's web UI, and what reads its pictures, say how a picture was made.

    a (red:1.2) circle <lora:night:0.5>
    Negative prompt: blue
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 12, Size: 512x512, Model: shapes

Written as `create_infotext` in its `modules/processing.py` does it, and read as `parse_generation_parameters` in
`modules/infotext_utils.py` does (version 1.10). A prompt there is always in the syntax `a1111`: the brackets of one
that is `plain` here are written as `\(`. What the text cannot say (a line of a prompt that begins with "Negative
prompt:", spaces around lines) is why our own record stands beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from diffuserve import __version__
from diffuserve.lora.choice import LoraChoice

__all__ = ["MAX_CHARACTERS", "SAMPLER_LABELS", "SCHEDULE_LABELS", "infotext", "parameters_from_infotext"]

#: Two prompts as long as they may be, and as much again.
MAX_CHARACTERS: Final = 1 << 15
_MAX_LAST_LINE: Final = 1 << 13

_NEGATIVE: Final = "Negative prompt:"
_BRACKETS: Final = re.compile(r"[()\[\]\\]")
_LORA: Final = re.compile(r" ?<lora:([^:<>]+)((?::[^:<>]*)*)>")
_PAIR: Final = re.compile(r'\s*(\w[\w \-/]{1,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST_PAIRS: Final = 3  # fewer are the last line of a prompt
_SIZE: Final = re.compile(r"(\d{1,9})x(\d{1,9})\Z")

#: The web UI's names of samplers. Those that it does not have are written in its manner.
SAMPLER_LABELS: Final = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "lms": "LMS",
    "pndm": "PLMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
    "tcd": "TCD",
}
SCHEDULE_LABELS: Final = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
}
_READ_SCHEDULES: Final = {"uniform": "normal", "simple": "sgm_uniform"}
# What "Automatic" means there, by sampler: `modules/sd_samplers_kdiffusion.py`.
_AUTOMATIC: Final = {
    "DPM++ 2M": "karras",
    "DPM++ 2M SDE": "exponential",
    "DPM2": "karras",
    "DPM2 a": "karras",
}


def infotext(parameters: Mapping[str, Any], *, begins_with_picture: bool = False) -> str:
    """The text for GenerateRequest's fields, by their names; None, or no such field, is not said."""
    known = {name: value for name, value in parameters.items() if value not in (None, "", ())}
    escape = parameters.get("prompt_syntax") != "a1111"
    prompt, negative = (
        _BRACKETS.sub(r"\\\g<0>", text) if escape else text
        for text in (str(parameters.get("prompt", "")), str(parameters.get("negative_prompt", "")))
    )
    tags = "".join(f" <lora:{one.name}:{_number(one.weight)}>" for one in map(LoraChoice.parse, known.get("loras", ())))
    said: dict[str, Any] = {
        "Steps": known.get("steps"),
        "Sampler": SAMPLER_LABELS.get(known.get("sampler", ""), known.get("sampler")),
        "Schedule type": SCHEDULE_LABELS.get(known.get("sigma_schedule", ""), known.get("sigma_schedule")),
        "CFG scale": known.get("guidance_scale"),
        "Seed": known.get("seed"),
        "Size": f"{known['width']}x{known['height']}" if {"width", "height"} <= known.keys() else None,
        "Model": known.get("checkpoint"),
        "Denoising strength": known.get("strength") if begins_with_picture else None,
        "Clip skip": known["clip_skip"] + 1 if known.get("clip_skip") else None,  # the web UI counts from 1
        "Eta DDIM": known.get("eta") or None,
        "Guidance rescale": known.get("guidance_rescale") or None,
        "RNG": "CPU",  # noise is drawn as the web UI draws it with this setting
        "Version": f"diffuserve {__version__}",
    }
    last = ", ".join(f"{name}: {_quoted(_number(value))}" for name, value in said.items() if value is not None)
    return "\n".join(filter(None, (prompt + tags, f"{_NEGATIVE} {negative}" if negative else "", last))).strip()


def parameters_from_infotext(text: str) -> dict[str, Any]:
    """GenerateRequest's fields, as far as the text says them.

    Raises ValueError for numbers that are none, and for a text that no web UI wrote.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its text has more than {MAX_CHARACTERS} characters")
    *lines, last = text.strip().split("\n")
    pairs = dict(_pairs(last)) if len(last) <= _MAX_LAST_LINE else {}
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], {}
    prompt, negative = _prompts(lines)
    loras = list(_loras(prompt))
    found: dict[str, Any] = {
        "prompt": _LORA.sub("", prompt),
        "negative_prompt": negative,
        "prompt_syntax": "a1111",
        **({"loras": loras} if loras else {}),
        **dict(_read(pairs)),
    }
    return found


def _prompts(lines: list[str]) -> tuple[str, str]:
    prompts: tuple[list[str], list[str]] = ([], [])
    is_negative = False
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            is_negative = True
            line = line.removeprefix(_NEGATIVE).strip()
        # As there: nothing stands before the first line that has something.
        if line or prompts[is_negative]:
            prompts[is_negative].append(line)
    return "\n".join(prompts[0]), "\n".join(prompts[1])


def _loras(prompt: str) -> Iterator[str]:
    """The LoRAs of a prompt's tags, whose first number is the weight; with names, `te` and `unet` are two of them."""
    for name, rest in _LORA.findall(prompt):
        weights = [part.partition("=")[2] or part for part in rest.split(":")[1:]]
        yield f"{name}:{weights[0]}" if weights and weights[0] else name


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    for name, value in _PAIR.findall(line):
        if value[:1] == '"' == value[-1:]:
            try:
                yield name, str(json.loads(value))
            except (ValueError, RecursionError):
                yield name, value
        else:
            yield name, value.strip()


def _read(pairs: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    numbers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "Steps": ("steps", int),
        "CFG scale": ("guidance_scale", float),
        "Seed": ("seed", int),
        "Denoising strength": ("strength", float),
        "Clip skip": ("clip_skip", lambda text: max(int(text) - 1, 0)),
        "Eta DDIM": ("eta", float),
        "Guidance rescale": ("guidance_rescale", float),
    }
    for said, (name, kind) in numbers.items():
        if said in pairs:
            try:
                yield name, kind(pairs[said])
            except ValueError as error:
                raise ValueError(f"its text says {said}: {pairs[said][:32]!r}, which is no number") from error
    for said, name in (("Sampler", "sampler"), ("Model", "checkpoint")):
        if pairs.get(said):
            yield name, pairs[said]
    if size := _SIZE.match(pairs.get("Size", "")):
        yield from zip(("width", "height"), map(int, size.groups()), strict=True)
    schedule = pairs.get("Schedule type", "")
    if schedule == "Automatic":
        schedule = _AUTOMATIC.get(pairs.get("Sampler", ""), "")
    if schedule:
        yield "sigma_schedule", _READ_SCHEDULES.get(schedule.lower(), schedule.lower().replace(" ", "_"))


def _number(value: Any) -> Any:
    """As people write it: float32's digits, and no decimals where there are none."""
    return f"{value:.7g}" if isinstance(value, float) else value


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(one in text for one in ",\n:") else text
