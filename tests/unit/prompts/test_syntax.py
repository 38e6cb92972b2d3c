"""A1111's brackets. Expected readings are those of its own `parse_prompt_attention`."""

from __future__ import annotations

import time

import pytest

from diffuserve.errors import DiffuserveError, InvalidArgumentError, UnsupportedError
from diffuserve.prompts.syntax import Span, parse_a1111, parse_plain


def read(text: str) -> list[tuple[str, float] | None]:
    return [None if part is None else (part.text, part.weight) for part in parse_a1111(text, "prompt")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [("", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("a [faint] word", [("a ", 1.0), ("faint", 1 / 1.1), (" word", 1.0)]),
        ("(a:1.3)(b: 1.3 )", [("ab", 1.3)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:-0.5) (b:.5)", [("a", -0.5), (" ", 1.0), ("b", 0.5)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights(text: str, parts: list[tuple[str, float]]) -> None:
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"(\(a\):1.2)", [("(a)", 1.2)]),
        (r"a\\b", [(r"a\b", 1.0)]),
        (r"a\b", [("ab", 1.0)]),  # one that escapes nothing is lost
    ],
)
def test_escapes(text: str, parts: list[tuple[str, float]]) -> None:
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b (c", [("a ", 1.0), ("b ", 1 / 1.1), ("c", 1.1 / 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(a]b)", [("a]b", 1.1)]),
        ("()[]", [("", 1.0)]),
        ("(x:1e30)", [("x:1e30", 1.1)]),  # no number by its rules, so letters
        ("(x:nan)", [("x:nan", 1.1)]),
        ("x: y", [("x: y", 1.0)]),
    ],
)
def test_what_does_not_fit_is_letters_or_holds_to_the_end(text: str, parts: list[tuple[str, float]]) -> None:
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a BREAK b", [("a", 1.0), None, ("b", 1.0)]),
        ("a\n BREAK \n(b)BREAKc", [("a", 1.0), None, ("", 1.0), ("b", 1.1), ("BREAKc", 1.0)]),
        ("BREAK", [("", 1.0), None, ("", 1.0)]),
        ("a BREAK BREAK b", [("a", 1.0), None, ("", 1.0), None, ("b", 1.0)]),
        ("a BREAKS break b", [("a BREAKS break b", 1.0)]),
        ("(a BREAK b)", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]),  # as there: a word, in brackets
    ],
)
def test_breaks(text: str, parts: list[tuple[str, float] | None]) -> None:
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(x:99999999999999)", "the weight of 'x' is 1e.14, and must be from -10 to 10"),
        ("((a:5):5)", "the weight of 'a' is 25"),
        ("(x:-11)", "the weight of 'x' is -11"),
        (f"{'(' * 8000}x", "the weight of 'x' is inf, .* use fewer of them"),
        (f"(x:{'9' * 400})", "the weight of 'x' is inf"),
        (f"((x:{'9' * 400}):0)", "the weight of 'x' is nan"),
        ("(x:1.2.3)", "the weight '1.2.3' is no number; write one such as 1.3"),
        ("(x:...)", "the weight '...' is no number"),
    ],
)
def test_weights_have_limits(text: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        parse_a1111(text, "negative_prompt")
    assert caught.value.detail["input"] == "negative_prompt"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a [cat:dog:0.5] b", r"prompt holds '\[cat:dog:0.5\]', and prompts do not change"),
        ("a [cat:10]", r"\[cat:10\]"),
        ("a [cat::.5 ]", r"\[cat::.5 \]"),
        ("[a:[b:c:2]:1]", r"\[b:c:2\]"),
        ("((a][:b:c [d:3]", r"\[d:3\]"),
        ("[(a:2):3]", r"\[\(a:2\):3\]"),
        ("a [cat|dog] b", r"\[cat\|dog\]"),
        ("a cat AND a dog", "prompt holds 'AND', and prompts are not composed"),
        ("a cat <lora:style:0.8>", "prompt holds '<lora:style:0.8>', and networks are not loaded"),
    ],
)
def test_what_makes_more_than_one_prompt_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        parse_a1111(text, "prompt")


@pytest.mark.parametrize(
    "text", ["[a:b]", r"\[cat:dog:0.5\]", "cat:dog:0.5]", "[cat:dog:0.5", "a|b", "a ANDb", "<ring>"]
)
def test_what_only_looks_like_it_is_read(text: str) -> None:
    assert parse_a1111(text, "prompt")


@pytest.mark.parametrize("digits", ["1" * 8000, "1" * 4000 + "." + "1" * 4000, "1e" + "1" * 8000, " " * 8000 + "1"])
def test_what_almost_is_a_number_takes_no_long_time(digits: str) -> None:
    started = time.process_time()
    assert parse_a1111(f"[:{digits}x]", "prompt")
    assert time.process_time() - started < 0.3


def test_and_is_a_word_in_a_negative_prompt() -> None:
    assert parse_a1111("a AND b", "negative_prompt", is_negative=True) == [Span("a AND b")]


def test_plain_prompts_have_no_brackets() -> None:
    text = "a (((house:1.3)) [on] BREAK AND [a|b]"
    assert parse_plain(text) == [Span(text)]


@pytest.mark.parametrize(
    "pattern", ["(", "(a", "a(", "[", "[1:", ":", " ", "\\", "BREAK ", "<a:", "(:", ":1", "[|", "(a:1.", "([", "é("]
)
def test_eight_kilobytes_of_anything_are_read_or_refused(pattern: str) -> None:
    text = (pattern * 8192)[:8192]
    for whole in (text, text[:4096] + ")" * 4096, text[:4096] + "]" * 4096):
        try:
            parts = parse_a1111(whole, "prompt")
        except DiffuserveError:
            continue
        assert all(part is None or abs(part.weight) <= 10 for part in parts)
