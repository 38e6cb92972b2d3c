"""The commands' help in docs/client.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from diffuserve_client._help_page import commands_help, main, with_help

PAGE = Path(__file__).parents[3] / "docs" / "client.md"


def test_every_command_is_told_and_shared_options_once() -> None:
    told = commands_help()
    for command in ("generate", "img2img", "inpaint", "models", "health", "doctor", "repository push", "rollout set"):
        assert f"# `diffuserve {command}`\n" in told
    for shared in ("DIFFUSERVE_URL", "DIFFUSERVE_TOKEN", "one is drawn otherwise, and for -1."):
        assert told.count(shared) == 1
    assert "(weights:1.3), [less] and BREAK" in told
    assert "pip install 'diffuserve[storage]'" in told
    assert "It takes the [connection options](#connection-options) and the [picture options](#picture-options)" in told
    assert "### Connection options\n" in told
    assert "### Picture options\n" in told


def test_a_page_that_differs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "client.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("Denoising steps.", "Steps."), encoding="utf-8")
    with pytest.raises(typer.Exit) as caught:
        main(page, check=True)
    assert caught.value.exit_code == 1
    assert "is out of date; run python -m diffuserve_client._help_page" in capsys.readouterr().err
    main(page)
    main(page, check=True)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="the page lacks the line"):
        with_help("# nothing")
