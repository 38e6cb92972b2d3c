"""Options that the commands share, and what they make of requests."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from diffuserve.request import MAX_SEED

__all__ = ["Concurrency", "Overwrite", "SettingOptions"]

Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Requests that are under way at once.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that has files already.")]


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    """What all pictures of a command share; None for the checkpoint's own."""

    checkpoint: Annotated[str | None, typer.Option(help="A deployed checkpoint.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None
    sampler: Annotated[str | None, typer.Option(help="Such as euler, unipc, 'DPM++ 2M Karras'.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None
    loras: Annotated[
        list[str] | None, typer.Option("--lora", help="A LoRA, as NAME or NAME:WEIGHT; as often as needed.")
    ] = None
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="The same for all pictures.", show_default="0")
    ] = None

    def given(self) -> dict[str, Any]:
        """What was said, by the names of GenerateRequest's fields."""
        said = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in said.items() if value not in (None, [])}
