"""The folder of textual inversions: which words name a file, and which files are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffuserve.errors import InvalidArgumentError
from diffuserve.prompts import embeddings
from diffuserve.prompts.embeddings import Embedding, EmbeddingFolder, Width

ONE = (Width("text_encoder", 4, ""),)
TWO = (Width("text_encoder", 4, "clip_l"), Width("text_encoder_2", 6, "clip_g"))


def put(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file(tensors or {"emb_params": torch.ones(1, 4)}, path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "embeddings"


def split(folder: EmbeddingFolder, text: str, checkpoint: str = "shapes") -> list[str]:
    """The pieces; embeddings by their names in braces, and nothing of empty ones."""
    (pieces,) = folder.split([text], checkpoint, "prompt")
    return [f"{{{one.name}}}" if isinstance(one, Embedding) else one for one in pieces if one]


def found(folder: EmbeddingFolder, word: str, checkpoint: str = "shapes") -> Embedding:
    (embedding,) = (one for one in folder.split([word], checkpoint, "prompt")[0] if isinstance(one, Embedding))
    return embedding


def test_words_are_files_names(root: Path) -> None:
    for name in ("ring", "my-style", "my", "v1.5_x"):
        put(root, name)
    folder = EmbeddingFolder(root)
    assert split(folder, "a red ring, here") == ["a red ", "{ring}", ", here"]
    assert split(folder, "RING of rings, string") == ["{ring}", " of rings, string"]
    assert split(folder, "<ring> <ring <rings>") == ["{ring}", " <", "{ring}", " <rings>"]
    assert split(folder, "my-style and my style, my-") == ["{my-style}", " and ", "{my}", " style, ", "{my}", "-"]
    assert split(folder, "v1.5_x. v1.5 ringv1.5_x") == ["{v1.5_x}", ". v1.5 ringv1.5_x"]
    assert split(folder, "äring ring_ ring猫 猫 ring") == ["äring ring_ ring猫 猫 ", "{ring}"]
    assert split(folder, "ring" * 3000) == ["ring" * 3000]
    assert split(folder, "<ring><ring>") == ["{ring}", "{ring}"]


def test_without_a_folder_there_are_none(root: Path) -> None:
    assert split(EmbeddingFolder(root), "a ring") == ["a ring"]


def test_files_are_found_as_they_come_change_and_go(root: Path) -> None:
    folder = EmbeddingFolder(root)
    assert split(folder, "ring") == ["ring"]
    path = put(root, "ring", a=torch.ones(1, 4))
    first = found(folder, "ring")
    assert found(folder, "ring") is first
    put(root, "other", a=torch.ones(3, 4))
    assert found(folder, "other").first == first.first + 1
    os.utime(path)
    assert found(folder, "ring") is first, "the same content"
    put(root, "ring", a=torch.full((2, 4), 2.0))
    second = found(folder, "ring")
    assert (second.count, second.first) == (2, first.first + 4)
    assert second.digest != first.digest
    path.unlink()
    assert split(folder, "ring") == ["ring"]


def test_a_list_is_kept_once_the_folder_rests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "ring")
    os.utime(root, (1, 1))
    folder = EmbeddingFolder(root)
    found(folder, "ring")
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda _: pytest.fail("it was listed again"))
        found(folder, "ring")
    put(root, "circle")
    assert found(folder, "circle").name == "circle"


def test_a_checkpoints_own_come_first(root: Path) -> None:
    put(root, "ring", a=torch.ones(1, 4))
    put(root / "large", "ring", clip_l=torch.ones(2, 4), clip_g=torch.ones(2, 6))
    put(root / "large", "style", clip_l=torch.ones(2, 4), clip_g=torch.ones(2, 6))
    folder = EmbeddingFolder(root)
    assert (found(folder, "ring").count, found(folder, "ring", "large").count) == (1, 2)
    assert split(folder, "style", "shapes") == ["style"]
    assert split(folder, "style", "large") == ["{style}"]


@pytest.mark.parametrize(
    ("tensors", "widths", "shapes"),
    [
        ({"<ring>": torch.ones(4)}, ONE, {"text_encoder": (1, 4)}),
        ({"<ring>": torch.ones(3, 4).half()}, ONE, {"text_encoder": (3, 4)}),
        ({"emb_params": torch.ones(75, 4).bfloat16()}, ONE, {"text_encoder": (75, 4)}),
        (
            {"clip_g": torch.ones(2, 6), "clip_l": torch.ones(2, 4)},
            TWO,
            {"text_encoder": (2, 4), "text_encoder_2": (2, 6)},
        ),
    ],
)
def test_formats(root: Path, tensors: Any, widths: tuple[Width, ...], shapes: dict[str, Any]) -> None:
    put(root, "ring", **tensors)
    vectors = found(EmbeddingFolder(root), "ring").of(widths, "prompt")
    assert {name: tuple(one.shape) for name, one in vectors.items()} == shapes
    assert all(one.dtype == torch.float32 for one in vectors.values())


@pytest.mark.parametrize(
    ("tensors", "widths", "said"),
    [
        ({"a": torch.ones(1, 6)}, ONE, "ring has vectors of width 6, and this checkpoint takes 4; use one"),
        ({"a": torch.ones(1, 4)}, TWO, r"width 4, and this checkpoint takes 4 \(clip_l\) and 6 \(clip_g\)"),
        (
            {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)},
            ONE,
            r"width 6 \(clip_g\) and 4 \(clip_l\), and this checkpoint takes 4;",
        ),
        ({"clip_l": torch.ones(1, 6), "clip_g": torch.ones(1, 6)}, TWO, r"and 6 \(clip_l\), and .* takes 4 \(clip_l\)"),
        ({"x": torch.ones(1, 4), "y": torch.ones(1, 6)}, TWO, r"width 4 \(x\) and 6 \(y\), and .* takes 4 \(clip_l\)"),
    ],
)
def test_another_width_is_refused_with_both(root: Path, tensors: Any, widths: tuple[Width, ...], said: str) -> None:
    put(root, "ring", **tensors)
    with pytest.raises(InvalidArgumentError, match=said):
        found(EmbeddingFolder(root), "ring").of(widths, "prompt")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.tensor([[1.0, float("nan")]])}, "ring.safetensors has values that are not finite"),
        ({"a": torch.tensor([[1.0, float("inf")]])}, "not finite"),
        ({"a": torch.tensor([[1.0, 2000.0]])}, "beyond 1000"),
        ({"a": torch.ones(1, 4).double()}, r"has values in torch.float64, and float32, float16 and bfloat16"),
        ({"a": torch.ones(1, 4).int()}, "has values in torch.int32"),
        ({"a": torch.ones(1, 2, 2)}, r"has a tensor of shape \[1, 2, 2\], and must have \[vectors, width\]"),
        ({"a": torch.ones(0, 4)}, r"has a tensor of shape \[0, 4\]"),
        ({"a": torch.tensor(1.0)}, r"has a tensor of shape \[\]"),
        ({"a": torch.ones(76, 4)}, "has 76 vectors, and at most 75 are read"),
        ({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(2, 6)}, "1 vectors in clip_l.* must have as many of each"),
        ({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, "has 3 tensors"),
        ({"a": torch.ones(1, 600_000)}, r"has 24000\d\d bytes, and at most 2097152 are read"),
    ],
)
def test_files_are_read_within_limits(root: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    put(root, "ring", **tensors)
    with pytest.raises(
        InvalidArgumentError, match=rf"prompt names the embedding ring, and .*{said}.*leave the word out"
    ):
        split(EmbeddingFolder(root), "a ring")


def test_what_is_no_safetensors_file_is_refused(root: Path) -> None:
    put(root, "other")
    folder = EmbeddingFolder(root)
    for content in (b"", b"PK\x03\x04pickle", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}"):
        (root / "ring.safetensors").write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"ring\.safetensors is no safetensors file"):
            split(folder, "ring")
    assert split(folder, "other") == ["{other}"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_pickles_are_never_read(root: Path, suffix: str) -> None:
    root.mkdir()
    (root / f"ring{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InvalidArgumentError, match=rf"ring\{suffix} is pickled, which can run code .* convert it"):
        split(EmbeddingFolder(root), "ring")
    put(root, "ring")
    assert split(EmbeddingFolder(root), "ring") == ["{ring}"]


def test_names_lead_nowhere_else(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = put(root.parent / "elsewhere", "secret")
    put(root / "sub", "inner")
    for name in (".hidden", "-x", "a b", "ä", "x" * 65):
        put(root, name)
    folder = EmbeddingFolder(root)
    for text in ("../elsewhere/secret", f"{secret}", "<../elsewhere/secret>", "sub/inner", ".hidden", "a b", "-x", "ä"):
        assert split(folder, text) == [text]
    assert split(folder, "x" * 65) == ["x" * 65]
    assert "a name that no request can have: 'a b.safetensors'" in caplog.text


def test_links_stay_inside(root: Path) -> None:
    """As Kubernetes mounts a ConfigMap: links to the files of a hidden folder beside them."""
    put(root.parent, "outside")
    put(root, "..data")
    put(root / "..stored", "inside")
    (root / "inside.safetensors").symlink_to(Path("..stored") / "inside.safetensors")
    (root / "outside.safetensors").symlink_to(root.parent / "outside.safetensors")
    (root / "nowhere.safetensors").symlink_to(root / "gone.safetensors")
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    folder = EmbeddingFolder(root)
    assert split(folder, "inside") == ["{inside}"]
    for word, said in (
        ("outside", "is a link out of the folder"),
        ("nowhere", r"cannot be read \(No such file"),
        ("folder", "is no file|cannot be read"),
        ("pipe", "is no file"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            split(folder, word)


def test_one_word_for_two_files_is_refused(root: Path) -> None:
    put(root, "Ring")
    put(root, "ring")
    with pytest.raises(
        InvalidArgumentError, match=r"is one of Ring.safetensors and ring.safetensors, which have one name"
    ):
        split(EmbeddingFolder(root), "a ring")


def test_few_files_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_KEPT", 2)
    for name in ("a", "b", "c"):
        put(root, name)
    folder = EmbeddingFolder(root)
    first = found(folder, "a")
    assert split(folder, "b c") == ["{b}", " ", "{c}"]
    assert list(map(lambda path: path.stem, folder._parsed)) == ["b", "c"]  # noqa: C417
    assert found(folder, "a").first == first.first + 3, "numbers are never given twice"
