"""Storyboard files: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffuserve_client import GenerateRequest, InvalidArgumentError
from diffuserve_client._studio.scenes import MAX_BYTES, MAX_SCENES, Scene, read_scenes

YAML = """
style: "{scene}, watercolour"
negative_prompt: blurry
seed: 7
steps: 30
width: 96
loras: [night:0.5]
strength: 0.5
duration: 1.5
scenes:
  - a fox {at} the edge of a wood
  - prompt: the fox crosses a brook
    init: previous
    duration: 3
  - prompt: the moon
    seed: 9
    steps: 10
    sampler: euler
    loras: []
"""


def read(tmp_path: Path, text: str, given: dict[str, Any] | None = None, name: str = "story.yaml") -> tuple[Scene, ...]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_scenes(tmp_path / name, given or {})


def test_a_text_file_has_a_scene_on_each_line(tmp_path: Path) -> None:
    text = "# a story\n\n  a fox\nthe moon: rising  \n"
    scenes = read(tmp_path, text, {"steps": 4, "duration": 2.0}, "story.txt")
    assert [one.prompt for one in scenes] == ["a fox", "the moon: rising"]
    assert {one.duration for one in scenes} == {2.0}
    assert scenes[1].request() == GenerateRequest(prompt="the moon: rising", seed=0, steps=4)


def test_a_yaml_file_says_what_scenes_share_and_what_each_has_of_its_own(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, YAML)
    shared: dict[str, Any] = {"negative_prompt": "blurry", "steps": 30, "width": 96, "loras": ("night:0.5",)}
    assert first.request() == GenerateRequest(prompt="a fox {at} the edge of a wood, watercolour", seed=7, **shared)
    assert second.request(b"picture") == GenerateRequest(
        prompt="the fox crosses a brook, watercolour", seed=7, init_image=b"picture", strength=0.5, **shared
    )
    assert third.request() == GenerateRequest(
        prompt="the moon, watercolour",
        seed=9,
        negative_prompt="blurry",
        steps=10,
        width=96,
        sampler="euler",
    )
    assert [one.duration for one in (first, second, third)] == [1.5, 3.0, 1.5]
    assert [one.from_previous for one in (first, second, third)] == [False, True, False]


def test_the_command_line_is_between_file_and_scene(tmp_path: Path) -> None:
    first, _, third = read(tmp_path, YAML, {"seed": 1, "steps": 2})
    assert [(one.request().seed, one.request().steps) for one in (first, third)] == [(1, 2), (9, 10)]


def test_style_without_a_place_comes_after_the_prompt(tmp_path: Path) -> None:
    scenes = read(tmp_path, "style: in ink\nscenes: [a fox]\n")
    assert scenes[0].prompt == "a fox, in ink"


def test_all_scenes_but_the_first_may_begin_with_the_one_before(tmp_path: Path) -> None:
    scenes = read(tmp_path, "init: previous\nscenes: [a, b, {prompt: c, init: none}]\n")
    assert [one.from_previous for one in scenes] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stlye: x\nscenes: [a]", "the file has the unknown key 'stlye'; known are style, width"),
        ("scenes: [{prompt: a, width: 64}]", "scene 1 has the unknown key 'width'; known are prompt, negative_prompt"),
        ("scenes: [{seed: 1}]", "scene 1 has no prompt"),
        ("scenes: [[a]]", "scene 1 has no prompt"),
        ("scenes: [a, 7]", "scene 2 has no prompt"),
        ("scenes: []", f"it has 0 scenes, and must have from 1 to {MAX_SCENES}"),
        ("seed: 1", "it has 0 scenes"),
        ("", "it holds no keys"),
        ("- a", "it holds no keys"),
        ("scenes: {a: b}", "scenes is a dict, and must be a list"),
        ("seed: x\nscenes: [a]", "the file: seed is 'x', and must be a whole number"),
        ("seed: true\nscenes: [a]", "the file: seed is 'True', and must be a whole number"),
        ("steps: 0\nscenes: [a]", "scene 1: steps is 0, and must be from 1 to 150"),
        ("loras: [1]\nscenes: [a]", "loras is a list, and must be a list of texts"),
        ("duration: .nan\nscenes: [a]", "duration is 'nan', and must be a number"),
        ("duration: 0.01\nscenes: [a]", "scene 1: duration is 0.01 s, and must be from 0.02 to 900"),
        ("duration: 600\nscenes: [a, b]", "the scenes last 1200 s in all, and may last 900"),
        ("scenes: [{prompt: a, init: previous}]", "scene 1 begins with the previous picture, and there is none"),
        ("scenes: [a, {prompt: b, init: next}]", "scene 2: init is 'next', and must be previous or none"),
        ("strength: 0.5\nscenes: [a, b]", "strength is given, and no scene begins with the picture before"),
        ("scenes: [a, {prompt: b, strength: 0.5}]", "scene 2 has strength without init; give `init: previous` too"),
        ("scenes: [a", "it is no YAML"),
        ("scenes: !!python/object/apply:os.system [ls]", "it is no YAML"),
        ("scenes: " + "[" * 1000, "it"),
        ("scenes: 2026-99-99", "its YAML cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        read(tmp_path, text)
    assert raised.value.message.startswith(f"{tmp_path / 'story.yaml'}: ")
    assert said in raised.value.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*no.txt: No such file"):
        read_scenes(tmp_path / "no.txt", {})
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidArgumentError, match="is not UTF-8"):
        read_scenes(tmp_path / "latin.txt", {})
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InvalidArgumentError, match=f"more than {MAX_BYTES} bytes"):
        read_scenes(tmp_path / "large.yaml", {})
    (tmp_path / "long.txt").write_text("a\n" * (MAX_SCENES + 1))
    with pytest.raises(InvalidArgumentError, match=f"it has {MAX_SCENES + 1} scenes"):
        read_scenes(tmp_path / "long.txt", {})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("seed", "the file: seed is a list, and must be a whole number"),
        ("loras", "the file: loras is a list, and must be a list of texts"),
        ("style", "the file: style is a list, and must be a text"),
    ],
)
def test_aliases_that_multiply_are_no_danger(tmp_path: Path, key: str, said: str) -> None:
    levels = ["&a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        levels.append(f"&{name} [{', '.join([f'*{before}'] * 10)}]")
    listed = "\n".join(f"- {level}" for level in levels)
    with pytest.raises(InvalidArgumentError) as raised:
        read(tmp_path, f"scenes:\n{listed}\n{key}: *j\n")
    assert said in raised.value.message
