"""Deployments to a folder and to a bucket, and back: what is sent, what is found wrong, and what goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import CancelledError, InvalidArgumentError, NotFoundError
from diffuserve.repository import (
    DamagedError,
    Progress,
    RepositoryError,
    StorageError,
    list_versions,
    pull,
    push,
    store,
    verify_folder,
    verify_store,
)
from diffuserve.repository.folder import RECEIPT_FILE, SUMS_FILE, blob_of, stored_files
from diffuserve.repository.version import Blob, DeploymentVersion
from unit.repository.conftest import EVERYWHERE, MakeDeployment, Place, flipped, seal

MakePlace = Callable[[], Place]
UNET = "models/fake_unet/1/model.onnx"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pushed(folder: Path, *places: Place, **options: Any) -> DeploymentVersion:
    """Push to places that must all take it; the version that the first one then has."""
    reports = push(folder, [place.url for place in places], **options)
    assert [one.error for one in reports] == [""] * len(places)
    return places[0].store.version(reports[0].name, reports[0].version)


class StopsAfter(Progress):
    """Interrupts a transfer once so many bytes of it are done."""

    def __init__(self, count: int, of: str) -> None:
        super().__init__()
        self.left, self.of = count, of

    def advanced(self, label: str, count: int) -> None:
        if label == self.of:
            self.left -= count
            if self.left <= 0:
                raise CancelledError("the test interrupts")


@EVERYWHERE
def test_a_deployment_comes_back_as_it_was_without_keys_and_caches(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    root = make_deployment()
    version = pushed(root, place)
    assert set(version.files) == {
        "deployment.json",
        "checkpoints/fake/manifest.json",
        "checkpoints/fake/tokenizer.json",
        "checkpoints/fake/SHA256SUMS",
        "embeddings/word.safetensors",
        UNET,
        "models/fake_unet/1/model.py",
        "models/fake_vae/1/model.onnx",
        "models/fake_vae/1/model.py",
    }
    out = tmp_path / "new" / "restored"
    report = pull([place.url], "mine", out)
    restored = contents(out)
    assert restored.pop(RECEIPT_FILE)
    assert restored == {path: contents(root)[path] for path in version.files}
    assert (report.fetched, report.kept, report.problems) == (len(version.blobs), 0, ())
    assert not list(out.parent.glob(".restored*"))
    assert verify_folder(out).problems == verify_store(place.url).problems == ()


@EVERYWHERE
def test_equal_files_are_stored_once_over_all_deployments_and_versions(
    make_deployment: MakeDeployment, place: Place
) -> None:
    first = pushed(make_deployment("mine"), place)
    assert place.blobs() == sorted(blob.sha256 for blob in first.blobs)
    (report,) = push(make_deployment("other", model=b"new weights"), [place.url])
    assert (report.name, report.sent, report.kept) == ("other", 2, len(first.blobs) - 2)  # and its list of digests
    assert len(place.blobs()) == len(first.blobs) + 2
    listing = list_versions(place.url)
    assert [(one.name, one.checkpoints) for one in listing.versions] == [("mine", ("fake",)), ("other", ("fake",))]
    assert listing.bytes < sum(one.bytes for one in listing.versions)
    assert listing.versions[0].own_bytes > 7000 > listing.versions[1].own_bytes


def test_a_second_push_sends_nothing(make_deployment: MakeDeployment, place: Place) -> None:
    root = make_deployment()
    pushed(root, place)
    (again,) = push(root, [place.url])
    assert (again.sent, again.sent_bytes) == (0, 0)
    assert len(list_versions(place.url).versions) == 1


def test_a_version_never_changes(make_deployment: MakeDeployment, place: Place, tmp_path: Path) -> None:
    pushed(make_deployment("mine"), place, name="shop", version="v1")
    (report,) = push(make_deployment("other", model=b"other"), [place.url], name="shop", version="v1")
    assert "a version never changes" in report.error
    assert report.sent == 0
    pushed(tmp_path / "other", place, name="shop", version="v2")
    pull([place.url], "shop@v1", tmp_path / "out")
    assert (tmp_path / "out" / UNET).read_bytes() == b"weights" * 1000


@EVERYWHERE
def test_two_pushes_of_one_version_cannot_both_write_it(make_deployment: MakeDeployment, place: Place) -> None:
    version = pushed(make_deployment(), place)
    with pytest.raises(InvalidArgumentError, match="another push has just written"):
        place.store.publish(replace(version, created="2020-01-01T00:00:00Z"))
    assert place.store.version(version.name, version.version).created == version.created


def test_without_a_version_the_one_that_was_pushed_last(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    pushed(make_deployment("b", model=b"old"), place, name="shop", version="z-old")
    newer = pushed(make_deployment("a", model=b"new"), place, name="shop", version="a-new")
    place.store.publish(replace(newer, version="m-later", created="2999-01-01T00:00:00Z"))
    assert pull([place.url], "shop", tmp_path / "out").version == "m-later"
    assert list_versions(place.url, "shop").versions[0].version == "m-later"


def test_a_push_of_what_was_there_tells_of_a_newer_version(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    old = pushed(make_deployment("b", model=b"old"), place, name="shop")
    place.store.publish(replace(old, version="newer", created="2999-01-01T00:00:00Z"))
    place.store.publish(replace(old, version="damaged"))
    place.overwrite("deployments/shop/damaged.json", flipped)
    (again,) = push(tmp_path / "b", [place.url], name="shop")
    assert (again.error, again.newest, again.is_outdated) == ("", "newer", True)
    (again,) = push(tmp_path / "b", [place.url], name="shop", version="newer")
    assert (again.newest, again.is_outdated) == ("newer", False)
    (first,) = push(tmp_path / "b", [place.url], name="other")
    assert not first.is_outdated


@EVERYWHERE
def test_an_interrupted_push_goes_on_and_shows_nothing_before(make_deployment: MakeDeployment, place: Place) -> None:
    root = make_deployment()
    total = sum((root / path).stat().st_size for path in stored_files(root))
    (report,) = push(root, [place.url], jobs=1, progress=StopsAfter(total - 300, place.url))
    assert "the test interrupts" in report.error
    assert report.sent + report.kept < len(stored_files(root))
    assert list_versions(place.url).versions == ()
    with pytest.raises(NotFoundError, match="has no mine"):
        pull([place.url], "mine", root.parent / "out")
    sent_before = len(place.blobs())
    assert sent_before >= 1
    (report,) = push(root, [place.url])
    assert (report.error, report.kept) == ("", sent_before)
    assert verify_store(place.url).problems == ()


@EVERYWHERE
def test_an_interrupted_pull_goes_on_and_trusts_nothing_that_is_not_whole(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    version = pushed(make_deployment(), place)
    out = tmp_path / "out"
    with pytest.raises(CancelledError):
        pull([place.url], "mine", out, jobs=1, progress=StopsAfter(version.bytes - 300, "out"))
    assert not out.exists()
    (staging,) = tmp_path.glob(".out.*.pull")
    there = [path for path in version.files if (staging / path).exists()]
    assert {UNET, "checkpoints/fake/tokenizer.json"} <= set(there)
    (staging / UNET).write_bytes(flipped((staging / UNET).read_bytes()))
    (staging / "models" / "planted.py").write_text("not of this version")
    report = pull([place.url], "mine", out)
    assert report.kept == len({version.files[path] for path in there}) - 1
    assert (out / UNET).read_bytes() == b"weights" * 1000
    assert not (out / "models" / "planted.py").exists()
    assert verify_folder(out).problems == ()
    assert not staging.exists()


def test_a_pull_that_was_done_is_not_done_again(make_deployment: MakeDeployment, place: Place, tmp_path: Path) -> None:
    pushed(make_deployment(), place)
    out = tmp_path / "out"
    pull([place.url], "mine", out)
    assert pull([place.url], "mine", out).fetched == 0
    (out / UNET).write_bytes(b"changed")
    with pytest.raises(DamagedError, match=UNET):
        pull([place.url], "mine", out)
    with pytest.raises(InvalidArgumentError, match="exists already"):
        pull([place.url], "mine", tmp_path / "mine")


def test_a_checkpoint_that_is_exported_anew_into_a_pulled_folder(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    pushed(make_deployment(), place)
    out = tmp_path / "out"
    pull([place.url], "mine", out)
    folder = out / "checkpoints" / "fake"
    sums = (folder / SUMS_FILE).read_text()
    (folder / SUMS_FILE).write_text("".join(sums.splitlines(keepends=True)[1:]))
    assert [one.path for one in verify_folder(out).problems] == [f"checkpoints/fake/{SUMS_FILE}"], "cut, and no export"
    (folder / SUMS_FILE).unlink()
    assert f"checkpoints/fake/{SUMS_FILE}" in [one.path for one in verify_folder(out).problems]
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"source": "nowhere"', '"source": "elsewhere"'))
    (out / UNET).write_bytes(b"exported anew")
    (out / UNET).with_name("model.py").unlink()
    shutil.rmtree(out / "models" / "fake_vae")
    seal(out)
    assert verify_folder(out).problems == ()
    with pytest.raises(InvalidArgumentError, match="but fake was exported into it since"):
        pull([place.url], "mine", out)
    for path in (UNET, "embeddings/word.safetensors"):
        (out / path).write_bytes(b"damaged")
    assert [one.path for one in verify_folder(out).problems] == ["embeddings/word.safetensors", UNET]


@EVERYWHERE
def test_a_flipped_byte_in_storage_is_found_named_and_repaired(
    make_deployment: MakeDeployment, make_place: MakePlace, tmp_path: Path
) -> None:
    root, one, other = make_deployment(), make_place(), make_place()
    version = pushed(root, one, other)
    one.damage(version.files[UNET])
    (problem,) = verify_store(one.url).problems
    assert (problem.of, problem.path) == (version.reference, UNET)
    assert verify_store(one.url, version.reference).problems == (problem,)
    with pytest.raises(DamagedError, match=UNET):
        pull([one.url], "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = pull([one.url, other.url], "mine", tmp_path / "out")
    (told,) = report.problems
    assert UNET in told
    assert one.url in told
    (repaired,) = push(root, [one.url], repair=True)
    assert repaired.sent == 1
    assert verify_store(one.url).problems == ()


@EVERYWHERE
def test_missing_and_cut_blobs_are_found_and_sent_again(make_deployment: MakeDeployment, place: Place) -> None:
    root = make_deployment()
    version = pushed(root, place)
    place.overwrite(
        f"blobs/sha256/{version.files[UNET].sha256[:2]}/{version.files[UNET].sha256}", lambda data: data[:9]
    )
    gone = version.files["deployment.json"].sha256
    place.store.system.rm_file(f"{place.store.root}/blobs/sha256/{gone[:2]}/{gone}")
    problems = {one.path: one.problem for one in verify_store(place.url).problems}
    assert problems == {UNET: "it has 9 bytes instead of 7000", "deployment.json": "it is missing"}
    (report,) = push(root, [place.url])
    assert report.sent == 2
    assert verify_store(place.url).problems == ()


def test_a_damaged_manifest_is_told_and_another_source_has_it(
    make_deployment: MakeDeployment, make_place: MakePlace, tmp_path: Path
) -> None:
    one, other = make_place(), make_place()
    version = pushed(make_deployment(), one, other)
    one.overwrite(f"deployments/mine/{version.version}.json", flipped)
    listing = list_versions(one.url)
    assert listing.versions == ()
    assert version.reference in listing.problems[0]
    assert version.reference in verify_store(one.url).problems[0].problem
    with pytest.raises(DamagedError, match="is damaged"):
        pull([one.url], "mine", tmp_path / "out")
    for reference in ("mine", version.reference):
        assert pull([one.url, other.url], reference, tmp_path / "out" / reference).problems


def test_a_flipped_byte_in_a_folder_is_found_and_not_pushed(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    root = make_deployment()
    pushed(root, place)
    pull([place.url], "mine", tmp_path / "pulled")
    for folder in (root, tmp_path / "pulled"):
        file = folder / UNET
        file.write_bytes(flipped(file.read_bytes()))
        (problem,) = verify_folder(folder).problems
        assert problem.path == UNET
        with pytest.raises(DamagedError, match=UNET):
            push(folder, [place.url])
        file.unlink()
        (problem,) = verify_folder(folder).problems
        assert problem.problem == "it is missing, or cannot be read"
    word = tmp_path / "pulled" / "embeddings" / "word.safetensors"  # which no export made
    word.write_bytes(b"x")
    assert [one.path for one in verify_folder(tmp_path / "pulled").problems] == ["embeddings/word.safetensors", UNET]


def test_one_destination_that_fails_leaves_the_others_alone(
    make_deployment: MakeDeployment, make_place: MakePlace, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("in the way")
    one, other = make_place(), make_place()
    reports = push(make_deployment(), [one.url, f"{tmp_path}/a-file/store", other.url])
    assert [bool(report.error) for report in reports] == [False, True, False]
    assert "a-file" in reports[1].error
    assert verify_store(one.url).files == verify_store(other.url).files > 0


def test_sources_that_cannot_be_reached_are_passed_over(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    pushed(make_deployment(), place)
    (tmp_path / "a-file").write_text("in the way")
    bad = f"{tmp_path}/a-file/store"
    report = pull([bad, place.url], "mine", tmp_path / "out")
    assert report.problems
    assert all(bad in problem for problem in report.problems)
    with pytest.raises(RepositoryError, match="a-file"):
        pull([bad], "mine", tmp_path / "out-2")


@EVERYWHERE
def test_what_arrives_wrong_is_found_and_removed(
    make_deployment: MakeDeployment, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: store.Store, file: Path, path: str, advance: Callable[[int], None]) -> None:
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(path, flipped(file.read_bytes()))

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "_put", put)
        patch.setattr(store._FolderStore, "_put", put)
        (report,) = push(make_deployment(), [place.url], jobs=1)
    assert "is not what was sent" in report.error
    assert place.blobs() == []


def test_a_file_that_changes_while_it_is_pushed(make_deployment: MakeDeployment, place: Place) -> None:
    root = make_deployment()

    class Changes(Progress):
        def began(self, label: str, total: int) -> None:
            if label == place.url:  # its digest was taken
                (root / UNET).write_bytes(b"a" * 7000)

    (report,) = push(root, [place.url], progress=Changes())
    assert "has changed while it was pushed" in report.error
    assert list_versions(place.url).versions == ()


@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_that_goes_while_it_is_pushed(
    make_deployment: MakeDeployment, make_place: MakePlace, monkeypatch: pytest.MonkeyPatch, read_before: bool
) -> None:
    root, one, other, of = make_deployment(), make_place(), make_place(), store._Prints.of

    def prints(file: Path, advance: Callable[[int], None]) -> Any:
        found = of(file, advance) if read_before else None
        if file == root / UNET:
            file.unlink(missing_ok=True)
        return found or of(file, advance)

    monkeypatch.setattr(store._Prints, "of", prints)
    for report in push(root, [one.url, other.url], jobs=1):
        assert "has changed while it was pushed (No such file or directory)" in report.error


def test_ctrl_c_is_heard_while_whole_files_are_read(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    class Reading(Progress):
        def advanced(self, label: str, count: int) -> None:
            if not count:
                raise CancelledError("the test interrupts")

    root = make_deployment()
    (report,) = push(root, [place.url], progress=Reading())
    assert "the test interrupts" in report.error
    assert place.blobs() == []
    version = pushed(root, place)
    with pytest.raises(CancelledError):
        pull([place.url], "mine", tmp_path / "out", progress=Reading())
    whole = tmp_path / f".out.{version.content[:16]}.pull" / UNET
    whole.parent.mkdir(parents=True)
    whole.write_bytes((root / UNET).read_bytes())
    with pytest.raises(CancelledError):
        pull([place.url], "mine", tmp_path / "out", jobs=1, progress=Reading())
    (report,) = push(root, [place.url], repair=True, progress=Reading())
    assert "the test interrupts" in report.error


def test_a_part_that_fails_keeps_the_others_from_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = list[int](), list[int]()

    class System:
        def info(self, path: str) -> dict[str, Any]:
            return {"type": "file", "size": 64}

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            begun.append(start)
            if start == 3:
                raise OSError("the storage is gone")
            time.sleep(0.01)  # others are being read when it fails
            ended.append(start)
            return b"x"

    monkeypatch.setattr(store, "_PART_BYTES", 1)
    one = store.Store("s3://b", System(), "b", 2)
    with pytest.raises(StorageError, match="the storage is gone"):
        one.fetch(Blob("a" * 64, 64), tmp_path / "file", lambda _: None)
    assert sorted(ended) == sorted({*begun} - {3}), "a part that was running wrote to a file that was closed"
    for _ in range(2):
        one._parts.submit(lambda: None).result()  # after all that was queued
    assert len(begun) < 32


def test_a_manifest_has_a_limit_whatever_its_size(make_deployment: MakeDeployment, place: Place) -> None:
    version = pushed(make_deployment(), place)
    os.truncate(place.store._version_path("mine", version.version), 1 << 40)
    (problem,) = list_versions(place.url).problems
    assert "more than 8388608 bytes" in problem


@EVERYWHERE
def test_transfers_have_a_bound(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    pushed(make_deployment(), place)
    monkeypatch.setattr(store, "_PART_BYTES", 200_000)
    kind = type(place.store.system)
    fetch = kind.cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.002)
        try:
            return fetch(self, path, start=start, end=end)
        finally:
            with lock:
                now[0] -= 1

    class Counting(kind):  # type: ignore[misc, valid-type]
        cat_file = counted

    monkeypatch.setattr("fsspec.get_filesystem_class", lambda protocol: Counting)
    pull([place.url], "mine", tmp_path / "out", jobs=3)
    assert verify_folder(tmp_path / "out").problems == ()
    assert most[0] == 3


def manifest_of(place: Place, version: DeploymentVersion, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a version's manifest anew, changed, with a digest that fits it: as somebody might who can write there."""
    from diffuserve.repository.version import _digest

    def changed(data: bytes) -> bytes:
        facts = json.loads(data)
        facts.pop("digest")
        change(facts)
        return json.dumps({**facts, "digest": _digest(facts)}).encode()

    place.overwrite(f"deployments/{version.name}/{version.version}.json", changed)


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "models/../../outside", ".lock", "snapshot.key"])
def test_no_manifest_writes_outside_of_the_folder(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path, path: str
) -> None:
    version = pushed(make_deployment(), place)
    manifest_of(place, version, lambda facts: facts["files"].update({path: facts["files"][UNET]}))
    before = contents(tmp_path)
    with pytest.raises(DamagedError, match="the path"):
        pull([place.url], "mine", tmp_path / "inner" / "out")
    assert contents(tmp_path) == before
    assert not Path("/tmp/outside").exists()


def test_a_manifest_under_the_name_of_another(make_deployment: MakeDeployment, place: Place, tmp_path: Path) -> None:
    version = pushed(make_deployment(), place, version="v1")
    manifest_of(place, version, lambda facts: facts.update(version="v2"))
    with pytest.raises(DamagedError, match="it is the manifest of mine@v2"):
        pull([place.url], "mine@v1", tmp_path / "out")


def test_a_deployment_that_names_checkpoints_outside(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path
) -> None:
    root = make_deployment()
    pushed(root, place)
    (root / "deployment.json").write_text('{"format_version": 1, "checkpoints": ["../../elsewhere"]}')
    with pytest.raises(InvalidArgumentError, match="elsewhere"):
        push(root, [place.url])
    with pytest.raises(InvalidArgumentError, match="elsewhere"):
        verify_folder(root)


def test_links_lead_nowhere(make_deployment: MakeDeployment, place: Place, tmp_path: Path) -> None:
    root, outside, out = make_deployment(), tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    version = pushed(root, place)
    staging = tmp_path / f".out.{version.content[:16]}.pull"
    staging.symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="remove it"):
        pull([place.url], "mine", out)
    staging.unlink()
    staging.mkdir()
    (staging / "models").symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="remove it"):
        pull([place.url], "mine", out)
    (staging / "models").unlink()
    out.symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="exists already"):
        pull([place.url], "mine", out)
    assert list(outside.iterdir()) == []
    (root / "models" / "link").symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="is a link"):
        push(root, [place.url])


def test_not_while_an_export_writes(make_deployment: MakeDeployment, place: Place) -> None:
    root = make_deployment()
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RepositoryError, match="being exported"):
            push(root, [place.url])
    pushed(root, place)


def test_one_pull_at_a_time(make_deployment: MakeDeployment, place: Place, tmp_path: Path) -> None:
    version = pushed(make_deployment(), place)
    staging = tmp_path / f".out.{version.content[:16]}.pull"
    staging.mkdir()
    with (staging / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RepositoryError, match="another pull"):
            pull([place.url], "mine", tmp_path / "out")
    pull([place.url], "mine", tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_fetched(
    make_deployment: MakeDeployment, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(make_deployment(), place)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RepositoryError, match=r"0\.00 GB free"):
        pull([place.url], "mine", tmp_path / "out")


def test_large_files_go_in_parts(
    make_deployment: MakeDeployment, s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place, part = Place(f"s3://{s3.make_bucket()}/parts"), 5 << 20  # S3's smallest
    monkeypatch.setattr(store, "_PART_BYTES", part)
    version = pushed(make_deployment(model=bytes(range(256)) * (2 * part // 256) + b"the end"), place)
    info = place.store.system.info(place.store._blob_path(version.files[UNET]))
    assert info["ETag"].endswith('-3"')
    root = tmp_path / "mine"
    assert store._Prints.of(root / UNET, lambda _: None).confirmed_by(info)
    assert not store._Prints.of(root / "deployment.json", lambda _: None).confirmed_by(info)
    pull([place.url], "mine", tmp_path / "out")
    assert blob_of(tmp_path / "out" / UNET) == version.files[UNET]


@pytest.mark.parametrize(
    "url", ["http://bucket/prefix", "ftp://x", "s3://", "gs:///", "", "/", "s3://key:secret@bucket"]
)
def test_what_is_no_place(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no place for deployments"):
        store.open_store(url, 1)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs")])
def test_a_package_that_is_missing(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(__import__("sys").modules, package, None)
    for name in ("s3", "gs"):
        monkeypatch.delitem(_registry, name, raising=False)
    with pytest.raises(StorageError, match=rf"{package}.*pip install 'diffuserve\[storage\]'"):
        store.open_store(url, 1)


def test_a_bucket_that_is_not_there(make_deployment: MakeDeployment, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="make the bucket"):
        list_versions("s3://no-such-bucket/x")
    (report,) = push(make_deployment(), ["s3://no-such-bucket/x"])
    assert "make the bucket" in report.error
