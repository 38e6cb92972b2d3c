"""Windows of tokens: how long prompts are cut into them."""

from __future__ import annotations

from diffuserve.prompts import PromptTokenizer
from diffuserve.prompts.windows import Token, Unit, windows
from unit.fakes import TOKENIZER

COMMA = 7


def units(*ids: int, weight: float = 1.0) -> list[Unit]:
    return [[Token(one, weight)] for one in ids]


def filled(*parts: list[Unit] | None, backtrack: int = 0) -> list[list[int]]:
    return [[token.id for token in window] for window in windows(parts, 75, COMMA, backtrack)]


def test_windows_are_filled_one_after_another() -> None:
    ids = list(range(100, 100 + 160))
    assert filled(units(*ids)) == [ids[:75], ids[75:150], ids[150:]]
    assert filled(units(*ids[:75])) == [ids[:75]]
    assert filled(units()) == [[]]
    assert filled(units(*ids[:40]), units(*ids[40:100])) == [ids[:75], ids[75:100]]


def test_a_break_begins_a_new_one() -> None:
    assert filled(units(1), None, units(2)) == [[1], [2]]
    assert filled(None, units(1), None, None, units(2), None) == [[], [1], [], [2]]
    full = [3] * 75
    assert filled(units(*full), None, units(2)) == [full, [2]]


def test_what_stands_after_a_late_comma_moves_to_the_next_window() -> None:
    before, after = [1] * 60, [2] * 14
    assert filled(units(*before, COMMA, *after, 3), backtrack=20) == [[*before, COMMA], [*after, 3]]
    assert filled(units(*before, COMMA, *after), backtrack=20) == [[*before, COMMA, *after]]  # it fits
    assert filled(units(*before, COMMA, *after, COMMA), backtrack=20) == [[*before, COMMA, *after], [COMMA]]
    # 54 before it: 21 from the comma to the end.
    far = [1] * 54
    assert filled(units(*far, COMMA, *[2] * 21), backtrack=20) == [[*far, COMMA, *[2] * 20], [2]]
    assert filled(units(*far, 1, COMMA, *[2] * 20), backtrack=20) == [[*far, 1, COMMA], [2] * 20]
    assert filled(units(*before, COMMA, *after, 3)) == [[*before, COMMA, *after], [3]]


def test_a_comma_counts_in_its_own_window_alone() -> None:
    first = [1] * 70
    ids = [*first, COMMA, *[2] * 4, *[3] * 80]
    assert filled(units(*ids), backtrack=20) == [[*first, COMMA], [*[2] * 4, *[3] * 71], [3] * 9]


def test_units_stay_in_one_window() -> None:
    inversion = [Token(9)] * 10
    assert filled([*units(*[1] * 70), inversion, *units(2)]) == [[1] * 70, [*[9] * 10, 2]]
    assert filled([*units(*[1] * 65), inversion, *units(2)]) == [[*[1] * 65, *[9] * 10], [2]]
    assert filled([[Token(9)] * 75, [Token(8)] * 75]) == [[9] * 75, [8] * 75]
    assert filled([*units(*[1] * 70, COMMA, *[2] * 4), inversion], backtrack=20) == [
        [*[1] * 70, COMMA],
        [*[2] * 4, *[9] * 10],
    ]


def test_weights_go_with_their_tokens() -> None:
    (window,) = windows([units(1, 2), units(3, weight=1.3)], 75)
    assert [(token.id, token.weight) for token in window] == [(1, 1.0), (2, 1.0), (3, 1.3)]
    tokenizer = PromptTokenizer(TOKENIZER, 77)
    made = tokenizer.window(window)
    assert made.ids == (49406, 1, 2, 3, 49407, *[49407] * 72)
    assert made.weights == (1.0, 1.0, 1.0, 1.3, 1.0, *[1.0] * 72)


def test_one_window_is_what_the_tokenizer_makes() -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(TOKENIZER.parent)
    tokenizer = PromptTokenizer(TOKENIZER, 77)
    for text in ("a large, red circle", "", "Ünïcode 猫 (x:1.3) \\(", "word " * 75):
        window = tokenizer.window([Token(one) for one in tokenizer.ids(text)])
        assert list(window.ids) == theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert set(window.weights) == {1.0}
    assert tokenizer.comma == theirs.convert_tokens_to_ids(",</w>")
