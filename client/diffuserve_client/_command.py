"""The `diffuserve` command.

gRPC, numpy, Pillow and rich are imported only when a request is sent, so that --help and mistakes answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from diffuserve import __version__
from diffuserve_client._bench import bench
from diffuserve_client._doctor import DOCTOR_EXIT_CODES_HELP, doctor
from diffuserve_client._exits import EXIT_CODES_HELP
from diffuserve_client._generate import generate, img2img, inpaint
from diffuserve_client._health import HEALTH_EXIT_CODES_HELP, health
from diffuserve_client._models import models
from diffuserve_client._repository import repository
from diffuserve_client._rollout import rollout
from diffuserve_client._studio.angles import angles
from diffuserve_client._studio.compare import compare
from diffuserve_client._studio.storyboard import storyboard

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make pictures from prompts on a diffuserve server.",
    epilog=EXIT_CODES_HELP,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffuserve {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # A command of its own for `generate` needs a callback beside it; its help is the Typer's.
    pass


for command in (generate, img2img, inpaint, compare, storyboard, angles, models, bench):
    app.command(epilog=EXIT_CODES_HELP)(command)
app.command(epilog=HEALTH_EXIT_CODES_HELP)(health)
app.command(epilog=DOCTOR_EXIT_CODES_HELP)(doctor)
app.add_typer(repository, name="repository")
app.add_typer(rollout, name="rollout")
