"""`diffuserve doctor`: what this machine can serve. Everything is looked up when the command runs, not at import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from diffuserve.doctor import Finding
    from diffuserve.manifest import Deployment

__all__ = ["DOCTOR_EXIT_CODES_HELP", "doctor"]

DOCTOR_EXIT_CODES_HELP: Final = (
    "Exit codes: 0 nothing stands in the way; 1 a problem was found; 2 the deployment cannot be read."
)


def doctor(
    deployment: Annotated[
        Path | None, typer.Option(help="A deployment's folder: say whether this machine can serve it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON array.")] = False,
) -> None:
    """Look at driver, GPU, memory, TensorRT and Triton, and say what this machine can serve."""
    from diffuserve.doctor import Level, diagnose, read_machine

    findings = diagnose(read_machine(), _opened(deployment) if deployment else None)
    typer.echo(_as_json(findings) if as_json else _as_text(findings))
    if any(finding.level is Level.PROBLEM for finding in findings):
        raise typer.Exit(1)


def _opened(folder: Path) -> Deployment:
    from diffuserve.manifest import Deployment

    try:
        opened = Deployment.load(folder)
        for name in opened.checkpoints:
            opened.manifest(name)
    except (OSError, ValueError) as error:
        typer.echo(f"diffuserve: the deployment {folder} cannot be read: {error}", err=True)
        raise typer.Exit(2) from error
    return opened


def _as_text(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.level.value:8} {finding.topic}: {finding.text}" for finding in findings)


def _as_json(findings: list[Finding]) -> str:
    rows = [{"level": one.level.value, "topic": one.topic, "text": one.text} for one in findings]
    return json.dumps(rows, ensure_ascii=False)
