"""The table of aliases: who gets which checkpoint, what promoting and rolling back make of it, and what is refused."""

from __future__ import annotations

import errno
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve.rollout import Alias, RolloutTable, change_table, parse_weights, read_table
from diffuserve.rollout.table import MAX_ALIASES, MAX_BYTES, MAX_TARGETS

CHECKPOINTS = ("v1", "v2", "v3")


def table(text: str = "shop=v1:90,v2:10", default: str | None = None) -> RolloutTable:
    name, weights = parse_weights(text)
    return RolloutTable({name: Alias.new(weights)}, default)


def chosen(one: RolloutTable, count: int = 20_000) -> list[str | None]:
    return [one.choose("shop", str(key))[0] for key in range(count)]


@pytest.mark.parametrize("weights", [{"v1": 90, "v2": 10}, {"v1": 1, "v2": 1, "v3": 2}, {"v1": 0.999, "v2": 0.001}])
def test_shares_are_as_weighted(weights: dict[str, float]) -> None:
    found = Counter(chosen(RolloutTable({"shop": Alias.new(weights)})))
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        spread = (share * (1 - share) / 20_000) ** 0.5
        assert abs(found[name] / 20_000 - share) < 4 * spread


def test_the_same_key_gets_the_same_and_no_process_decides_otherwise() -> None:
    assert chosen(table(), 200) == chosen(table(), 200)
    # From sha256 of alias and key: a server of another release must not shuffle everybody.
    asked = {who: table("shop=v1,v2").choose("shop", f"tag\0{who}")[0] for who in ("ann", "bob", "eve", "joe")}
    assert asked == {"ann": "v2", "bob": "v1", "eve": "v1", "joe": "v2"}


def test_whoever_has_the_new_version_keeps_it_as_its_share_grows() -> None:
    few, more = chosen(table("shop=v1:90,v2:10")), chosen(table("shop=v1:60,v2:40"))
    assert all(later == "v2" for earlier, later in zip(few, more, strict=True) if earlier == "v2")
    other = RolloutTable({"other": Alias.new({"v1": 90, "v2": 10})})
    assert [other.choose("other", str(key))[0] for key in range(20_000)] != few, "another alias, another draw"


def test_names_that_are_no_alias_are_left_alone() -> None:
    assert table().choose("v3", "a") == ("v3", None)
    assert table().choose(None, "a") == (None, None)
    assert table(default="v3").choose("", "a") == ("v3", None)
    assert table("shop=v2", default="shop").choose(None, "a") == ("v2", "shop")


def test_try_promote_and_roll_back() -> None:
    first = Alias.new({"v1": 1})
    tried = first.changed({"v1": 90, "v2": 10})
    assert (tried.stable, tried.rolled_back().weights) == (("v1",), {"v1": 1})
    more = tried.changed({"v1": 50, "v2": 50})
    assert list(more.rolled_back().weights) == ["v1"]
    promoted = more.promoted("v2")
    assert (list(promoted.weights), promoted.stable) == (["v2"], ("v1", "v2"))
    back = promoted.rolled_back()
    assert (list(back.weights), back.stable) == (["v1"], ("v1",))
    with pytest.raises(KeyError):
        back.rolled_back()
    with pytest.raises(KeyError):
        promoted.promoted("v1")
    third = promoted.changed({"v2": 1, "v3": 1})
    assert list(third.rolled_back().weights) == ["v2"]
    assert list(Alias.new({"v1": 90, "v2": 10}).rolled_back().weights) == ["v1"]
    assert Alias.new({"v1": 1}).promoted("v1").stable == ("v1",)


def test_a_table_comes_back() -> None:
    one = RolloutTable({"shop": Alias.new({"v2": 1, "v1": 90.5}).changed({"v2": 3})}, "shop")
    read = RolloutTable.from_json(one.to_json())
    assert read == one
    assert list(RolloutTable.from_json(table("shop=b:1,a:1").to_json()).aliases["shop"].weights) == ["b", "a"]


def raw(**changes: Any) -> dict[str, Any]:
    return {**json.loads(table().to_json()), **changes}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (raw(format_version=2), "format is 2"),
        (raw(default="../x"), "is no name"),
        (raw(aliases=[]), "another kind"),
        (raw(aliases={"../x": {"weights": {"v1": 1}, "stable": ["v1"]}}), "is no name"),
        (raw(aliases={"a": {"weights": {"../v1": 1}, "stable": ["v1"]}}), "is no name"),
        (raw(aliases={"a": {"weights": {}, "stable": ["v1"]}}), f"1 to {MAX_TARGETS}"),
        (raw(aliases={"a": {"weights": {f"v{one}": 1 for one in range(17)}, "stable": ["v1"]}}), f"1 to {MAX_TARGETS}"),
        (raw(aliases={"a": {"weights": {"v1": 0}, "stable": ["v1"]}}), "weight of 'v1' is 0"),
        (raw(aliases={"a": {"weights": {"v1": -1}, "stable": ["v1"]}}), "weight of 'v1' is -1"),
        (raw(aliases={"a": {"weights": {"v1": float("nan")}, "stable": ["v1"]}}), "is nan"),
        (raw(aliases={"a": {"weights": {"v1": float("inf")}, "stable": ["v1"]}}), "is inf"),
        (raw(aliases={"a": {"weights": {"v1": True}, "stable": ["v1"]}}), "is True"),
        (raw(aliases={"a": {"weights": {"v1": "1"}, "stable": ["v1"]}}), "is '1'"),
        (raw(aliases={"a": {"weights": {"v1": 1}, "stable": []}}), "stable must list"),
        (raw(aliases={"a": {"weights": {"v1": 1}}}), "lacks"),
        (
            raw(aliases={f"a{one}": {"weights": {"v1": 1}, "stable": ["v1"]} for one in range(65)}),
            f"at most {MAX_ALIASES}",
        ),
    ],
)
def test_a_broken_table_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutTable.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "[", "null", "[]", "{}", "[" * 50_000])
def test_what_is_no_table(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        RolloutTable.from_json(text)


@pytest.mark.parametrize(
    "text",
    ["shop", "shop=", "=v1", "shop=v1:", "shop=v1:x", "shop=v1:-1", "shop=v1:nan", "shop=v1:0", "shop=v1,v1", "a b=c"],
)
def test_weights_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="shop=shop-v1:90,shop-v2:10"):
        parse_weights(text)


def test_weights_as_they_are_written() -> None:
    assert parse_weights("shop=v1:90, v2:10") == ("shop", {"v1": 90.0, "v2": 10.0})
    assert parse_weights("shop=v2,v1") == ("shop", {"v2": 1.0, "v1": 1.0})
    assert parse_weights("shop=v2:1,v1:0") == ("shop", {"v2": 1.0})


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InvalidArgumentError, match=r"stays as it is: .*No space left"):
        change_table(tmp_path, CHECKPOINTS, lambda _: table())
    assert [path.name for path in tmp_path.iterdir()] == [".rollout.lock"]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (table("v2=v1"), "alias v2 has a checkpoint's name"),
        (table("shop=v1,v9"), "names v9; there are v1, v2, v3"),
        (table(default="elsewhere"), "default elsewhere is neither"),
    ],
)
def test_what_a_deployment_does_not_have(tmp_path: Path, one: RolloutTable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one.check(CHECKPOINTS)
    change_table(tmp_path, CHECKPOINTS, lambda _: table())
    with pytest.raises(InvalidArgumentError, match=f"stays as it is: .*{message}"):
        change_table(tmp_path, CHECKPOINTS, lambda _: one)
    assert read_table(tmp_path)[0] == table()


def test_changes_at_the_same_time_are_all_made(tmp_path: Path) -> None:
    assert read_table(tmp_path) == (RolloutTable(), "")

    def change(number: int) -> None:
        change_table(tmp_path, CHECKPOINTS, lambda now: now.with_alias(f"a{number}", Alias.new({"v1": 1})))

    threads = [threading.Thread(target=change, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_table(tmp_path)[0].aliases) == 16
    assert not list(tmp_path.glob(".rollout.json*"))


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="more than"):
        read_table(tmp_path)
    (tmp_path / "rollout.json").unlink()
    (tmp_path / "elsewhere").write_text(table().to_json())
    (tmp_path / "rollout.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="rollout"):
        read_table(tmp_path)
