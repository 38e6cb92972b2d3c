"""What a bench asks for, and when."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import GenerateRequest
from diffuserve_client._bench.load import ClosedLoop, Extent, OpenLoop, poisson_arrivals
from diffuserve_client._bench.mix import Mix, read_prompts

A = {"prompt": "a"}


def drawn(count: int, **parts: Any) -> list[GenerateRequest]:
    return list(islice(Mix(**({"prompts": [A], "fixed": {}} | parts)).requests(), count))


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(list(islice(poisson_arrivals(25.0, seed=3), 20_000)))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() > 0
    # Exponential: of 20,000 gaps the mean is within 2.1 % (three deviations), and so is the deviation, within 3 %.
    assert gaps.mean() == pytest.approx(1 / 25, rel=0.021)
    assert gaps.std() == pytest.approx(1 / 25, rel=0.03)
    # The Kolmogorov-Smirnov distance is below 1.63 / sqrt(n) in 99 of 100 cases.
    expected = 1 - np.exp(-25 * np.sort(gaps))
    steps = np.arange(len(gaps)) / len(gaps)
    assert max(np.abs(expected - steps).max(), np.abs(expected - steps - 1 / len(gaps)).max()) < 1.63 / math.sqrt(
        20_000
    )
    # How many come in a second varies as much as it is on average; and no gap tells of the next one.
    counts = np.histogram(times, bins=np.arange(0, math.floor(times[-1])))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.16)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.022


def test_a_seed_makes_the_same_arrivals_and_another_others() -> None:
    first, again, other = (list(islice(poisson_arrivals(1.0, seed), 5)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_mix_takes_evenly_of_each_list() -> None:
    requests = drawn(
        8000,
        prompts=[A, {"prompt": "b"}],
        steps=[4, 8, 20, 50],
        samplers=["ddim", "euler"],
        checkpoints=["one", "two"],
        sizes=[(64, 64), (128, 64)],
        guided_share=0.25,
        guidance_scale=7.0,
        fixed={"progress_every": 1, "num_images": 2},
    )
    for kind, shares in {
        "prompt": {"a": 0.5, "b": 0.5},
        "steps": {4: 0.25, 8: 0.25, 20: 0.25, 50: 0.25},
        "sampler": {"ddim": 0.5, "euler": 0.5},
        "checkpoint": {"one": 0.5, "two": 0.5},
        "width": {64: 0.5, 128: 0.5},
        "height": {64: 1.0},
        "guidance_scale": {7.0: 0.25, 1.0: 0.75},
        "num_images": {2: 1.0},
        "progress_every": {1: 1.0},
    }.items():
        values = [getattr(one, kind) for one in requests]
        assert {value: values.count(value) / 8000 for value in set(values)} == pytest.approx(shares, abs=0.03)
    assert len({one.seed for one in requests}) > 7990
    pairs = [(one.steps, one.sampler) for one in requests]
    assert pairs.count((4, "ddim")) / 8000 == pytest.approx(1 / 8, abs=0.02), "each list by itself"


def test_a_seed_makes_the_same_requests_and_another_others() -> None:
    first, again, other = (drawn(50, steps=[1, 2, 3], seed=seed) for seed in (5, 5, 6))
    assert first == again != other


def test_what_is_not_said_is_the_servers() -> None:
    (one,) = drawn(1)
    assert one == GenerateRequest(prompt="a", seed=one.seed)
    (one,) = drawn(1, guidance_scale=3.0)
    assert one.guidance_scale == 3.0


def test_a_prompts_own_parameters_go_before_the_lists() -> None:
    (one,) = drawn(1, prompts=[{"prompt": "a", "steps": 3, "seed": 9, "loras": ["bar:0.5"]}], steps=[50])
    assert one == GenerateRequest(prompt="a", steps=3, seed=9, loras=("bar:0.5",))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"prompts": []}, "no prompt"),
        ({"steps": [4, 500]}, "steps is 500"),
        ({"sizes": [(64, 64)], "fixed": {"num_images": 99}}, "num_images is 99"),
        ({"prompts": [{"prompt": "a", "steps": "many"}]}, "steps is 'many'"),
        ({"prompts": [{"prompt": "a", "guidance_scale": "much"}]}, "correct it"),
        ({"guided_share": 1.5, "guidance_scale": 7.0}, "from 0 to 1"),
        ({"guided_share": 0.5}, "--guidance-scale"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_refused_before_any_load(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        drawn(0, **parts)


def test_prompts_from_files(tmp_path: Path) -> None:
    text, lines, yaml = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.yaml"
    text.write_text("a red circle\n\n  a blue ring  \n", encoding="utf-8")
    lines.write_text('"a red circle"\n{"prompt": "a blue ring", "steps": 4}\n', encoding="utf-8")
    yaml.write_text("- a red circle\n- {prompt: a blue ring, steps: 4}\n", encoding="utf-8")
    assert read_prompts(text) == [{"prompt": "a red circle"}, {"prompt": "a blue ring"}]
    assert read_prompts(lines) == read_prompts(yaml) == [
        {"prompt": "a red circle"},
        {"prompt": "a blue ring", "steps": 4},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "cannot read .*none.txt: No such file"),
        ("empty.txt", b"\n\n", "holds no prompt"),
        ("latin.txt", b"\xe9\n", "not UTF-8"),
        ("a.jsonl", b'"a"\n{"prompt"\n', "line 2 is no JSON"),
        ("a.jsonl", b'{"steps": 4}\n', "prompt 1 is .*must be a text"),
        ("a.jsonl", b'{"prompt": "a", "stepps": 4}\n', "prompt 1 has 'stepps', and may have prompt, "),
        ("a.yaml", b"prompt: a\n", "holds dict, and must be a list"),
        ("a.yaml", b"- [a\n", "is no YAML"),
        ("a.yaml", b"- 2024-13-45\n", "is no YAML"),
        ("a.yaml", b"[" * 5000, "is no YAML"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.txt", b"a" * (16 * 2**20 + 1), "has more than 16777216 bytes"),
    ],
)
def test_files_that_are_none_say_where(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=words):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClosedLoop(0), "concurrency is 0"),
        (lambda: ClosedLoop(9999), "from 1 to 4096"),
        (lambda: OpenLoop(0.0), "rate is 0.0"),
        (lambda: OpenLoop(math.nan), "rate is nan"),
        (lambda: Extent(), "give --requests, or --duration"),
        (lambda: Extent(3, 3.0), "said once"),
        (lambda: Extent(requests=0), "1 at least"),
        (lambda: Extent(seconds=math.inf), "finite"),
        (lambda: Extent(requests=1, warm_up=-1), "warm up with are -1"),
    ],
)
def test_loads_that_cannot_be_meant_are_refused(make: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make()
