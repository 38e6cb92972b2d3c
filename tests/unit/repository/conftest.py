"""Small deployments, and places to store them: a folder, and a bucket of a real S3-speaking server on loopback."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from diffuserve.repository.store import open_store
from diffuserve.repository.version import Blob
from s3_server import S3Server
from unit.fakes import write_deployment

MakeDeployment = Callable[..., Path]


@pytest.fixture
def make_deployment(tmp_path: Path) -> MakeDeployment:
    """Writes a deployment of fakes with files as an export leaves them: `model` is what its UNet's graph holds."""

    def make(name: str = "mine", model: bytes = b"weights" * 1000) -> Path:
        root = tmp_path / name
        write_deployment(root, "fake")
        for component, content in (("unet", model), ("vae", b"the same in all")):
            folder = root / "models" / f"fake_{component}" / "1"
            folder.mkdir(parents=True)
            (folder / "model.onnx").write_bytes(content)
            (folder / "model.py").write_text("# alike")
            (folder / "__pycache__").mkdir()
            (folder / "__pycache__" / "model.pyc").write_bytes(b"cache")
        seal(root)
        (root / "embeddings").mkdir()
        (root / "embeddings" / "word.safetensors").write_bytes(b"")
        (root / "snapshot.key").write_text("a secret that is nobody else's")
        (root / ".hashes.json").write_text("{}")
        return root

    return make


def seal(root: Path) -> None:
    """Write down the digests of an export's files, as the export does."""
    files = [path for path in sorted(root.rglob("*.*")) if path.parent != root and "__pycache__" not in path.parts]
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n" for path in files
    ]
    (root / "checkpoints" / "fake" / "SHA256SUMS").write_text("".join(lines))


class Place:
    """Where deployments are stored, and what a test needs to know of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = open_store(url, 4)

    def blobs(self) -> list[str]:
        found = self.store.system.find(f"{self.store.root}/blobs")
        return sorted(str(path).rpartition("/")[2] for path in found)

    def overwrite(self, path: str, change: Callable[[bytes], bytes]) -> None:
        """Change what is stored at a path below the root."""
        full = f"{self.store.root}/{path}"
        self.store.system.pipe_file(full, change(self.store.system.cat_file(full)))

    def damage(self, blob: Blob) -> None:
        self.overwrite(f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}", flipped)


def flipped(data: bytes) -> bytes:
    """The same with one bit of its middle byte changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


#: For tests in which storage has a part of its own; to others a folder is as good.
EVERYWHERE = pytest.mark.parametrize("make_place", ["folder", "s3"], indirect=True)


@pytest.fixture
def make_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Makes empty places of one kind."""
    numbers = itertools.count()
    if getattr(request, "param", "folder") == "folder":
        return lambda: Place(str(tmp_path / f"store-{next(numbers)}"))
    server: S3Server = request.getfixturevalue("s3")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = server.make_bucket()
    return lambda: Place(f"s3://{bucket}/prefix-{next(numbers)}")


@pytest.fixture
def place(make_place: Callable[[], Place]) -> Place:
    return make_place()
