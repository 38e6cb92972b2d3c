"""Pictures that a ControlNet looks at: what is refused, what rows are told, and what a snapshot holds of them."""

from __future__ import annotations

import base64
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffuserve.checkpoint import Checkpoint
from diffuserve.engine import HIDDEN_STATES, Control, Group, LatentPool, StepCosts, StepPolicy, Track
from diffuserve.errors import DiffuserveError, InvalidArgumentError, UnsupportedError
from diffuserve.manifest import Conditioning, Deployment
from diffuserve.request import Event, GenerateRequest
from diffuserve.sampling import TrajectoryCompiler
from diffuserve.sampling.matrix import REFERENCE
from diffuserve.service import DiffusionService
from unit.fakes import FakeModels, Recorder, write_deployment
from unit.pictures import SVG, encoded, mask, picture, png_of_size
from unit.test_handing_over import drained_at

CONTROLLED = Conditioning(control=True)
PICTURE, OTHER = encoded(picture()), encoded(mask().convert("RGB"))
KEY = b"the fleet's key"


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return write_deployment(tmp_path / "one", "fake", conditioning=CONTROLLED)


@pytest.fixture
def checkpoint(deployment: Deployment) -> Checkpoint:
    return Checkpoint(deployment, "fake", FakeModels().runner())


def asked(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a ring", "seed": 1, "steps": 5, "sampler": "ddim", **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"control_scale": 0.5}, "control_scale is given without control_image"),
        ({"control_image": SVG}, "control_image is no picture in PNG, JPEG, WEBP"),
        ({"control_image": PICTURE[:-30]}, "control_image cannot be decoded .* send the whole file"),
        ({"control_image": b"\0" * (33 << 20)}, "control_image has 34603008 bytes, and at most 33554432"),
        ({"control_image": png_of_size(5_000, 5_000)}, "control_image has 5000 x 5000 pixels, and at most 16777216"),
        ({"control_image": png_of_size(30_000, 30_000)}, "control_image has more pixels than the 16777216 in all"),
        ({"control_image": PICTURE, "control_scale": 2.5}, "control_scale is 2.5, and must be from 0 to 2"),
        ({"control_image": PICTURE, "control_scale": float("nan")}, "control_scale is nan, and must be from 0 to 2"),
        ({"control_image": PICTURE, "control_scale": -0.1}, "control_scale is -0.1, and must be from 0 to 2"),
    ],
)
def test_bad_controls_are_refused(checkpoint: Checkpoint, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        checkpoint.resolve(asked(**values))


def test_a_checkpoint_without_a_controlnet_says_so_before_it_reads_the_picture(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deployment(tmp_path, "plain"), "plain", FakeModels().runner())
    with pytest.raises(UnsupportedError, match="control_image is given, and plain has no ControlNet; leave it out"):
        checkpoint.resolve(asked(control_image=SVG))


def test_an_export_whose_unet_takes_no_control_is_refused(tmp_path: Path) -> None:
    deployment = write_deployment(tmp_path, "fake", conditioning=CONTROLLED)
    manifest = deployment.folder("fake") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"control": true', '"control": false'))
    with pytest.raises(ValueError, match=r"the UNet of fake takes control, .*; export it again"):
        Checkpoint(deployment, "fake", FakeModels().runner())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_a_control_is_read_as_diffusers_reads_it(checkpoint: Checkpoint, mode: str, size: tuple[int, int]) -> None:
    """Of another size and ratio than the picture: resized, and not cut."""
    levels = np.random.default_rng(1).integers(0, 256, (37, 100, 3), dtype=np.uint8)
    image = Image.fromarray(levels).convert(mode)
    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
    expected = processor.preprocess(image.convert("RGB"), width=size[0], height=size[1])[0]
    given = base64.b64encode(encoded(image))
    resolved = checkpoint.resolve(asked(control_image=given, control_scale=0.5, width=size[0], height=size[1]))
    control = checkpoint.control(resolved)
    assert control is not None
    assert control.scale == 0.5
    assert torch.equal(control.picture.float() / 255, expected)


def test_the_picture_has_the_size_of_the_control_unless_it_begins_with_another(checkpoint: Checkpoint) -> None:
    wide = encoded(picture(100, 37))
    for values, size in (
        ({"control_image": wide}, (96, 32)),
        ({"control_image": wide, "height": 64}, (96, 64)),
        ({"control_image": wide, "init_image": PICTURE}, (64, 64)),
    ):
        resolved = checkpoint.resolve(asked(**values))
        assert (resolved.width, resolved.height) == size
        assert resolved.control.size == size
        assert not resolved.request.control_image, "once it was read"


def make_track(seed: int, control: Control | None = None, rows: int = 2) -> Track:
    generator = torch.Generator().manual_seed(seed)
    return Track(
        group=Group("any", 16, 24),
        trajectory=TrajectoryCompiler(REFERENCE)("ddim", 3),
        guidance_scale=5.0,
        latents=torch.randn((4, 2, 3), generator=generator),
        conditioning={HIDDEN_STATES: torch.randn((rows, 3, 2), generator=generator)},
        generator=generator,
        control=control,
    )


class Seen:
    """A UNet that keeps a copy of what each call's rows were told, and where that lay."""

    def __init__(self) -> None:
        self.controls: list[torch.Tensor] = []
        self.scales: list[list[float]] = []
        self.places: list[int] = []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        self.controls.append(conditioning["control"].clone())
        self.scales.append(conditioning["control_scale"].tolist())
        self.places.append(conditioning["control"].data_ptr())
        assert conditioning["control"].is_contiguous()
        return sample * 0.1


def levels(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_rows_are_told_their_own_control_and_others_none() -> None:
    pool, seen = LatentPool(control=torch.float32), Seen()
    shared = levels(1)
    tracks = [make_track(0), make_track(1, Control(shared, 0.5)), make_track(2, Control(shared, 1.5), rows=1)]
    for track in tracks:
        pool.join(track)
    pool.step(tracks, seen, rows=7)
    expected = torch.stack([torch.zeros(3, 16, 24)] * 2 + [shared / 255] * 5)
    assert torch.equal(seen.controls[0], expected)
    assert seen.scales[0] == [0.0, 0.0, 0.5, 0.5, 1.5, 1.5, 1.5]
    pool.step(tracks[::-1], seen)  # another order
    assert torch.equal(seen.controls[1], torch.stack([shared / 255] * 3 + [torch.zeros(3, 16, 24)] * 2))
    assert seen.scales[1] == [1.5, 0.5, 0.5, 0.0, 0.0]


def test_controls_lie_where_they_lay_and_go_with_the_last_image() -> None:
    pool, seen = LatentPool(control=torch.float16), Seen()
    tracks = [make_track(seed, Control(levels(seed), 1.0)) for seed in range(3)]
    for track in tracks:
        pool.join(track)
    pool.step(tracks, seen)
    pool.step(tracks[1:], seen)
    pool.step(tracks, seen)
    assert len(set(seen.places)) == 1, "steps allocate nothing"
    assert {one.dtype for one in seen.controls} == {torch.float16}
    assert torch.equal(seen.controls[0], seen.controls[2])
    assert torch.equal(seen.controls[1], seen.controls[0][2:])
    for track in tracks:
        pool.leave(track)
        assert track.control is None
    assert pool._control is not None
    assert pool._control._rows.numel() == 0


@pytest.fixture
def start(deployment: Deployment) -> Iterator[Callable[..., tuple[DiffusionService, FakeModels]]]:
    services = []

    def start(where: Deployment = deployment) -> tuple[DiffusionService, FakeModels]:
        models = FakeModels()
        policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
        services.append(DiffusionService(where, models.runner(), policy=policy, key=KEY))
        return services[-1], models

    yield start
    for service in services:
        service.close()


Start = Callable[..., tuple[DiffusionService, FakeModels]]


def ask(service: DiffusionService, **values: Any) -> Recorder:
    reply = Recorder()
    service.submit(asked(**values), reply)
    return reply


def hold(event: threading.Event) -> None:
    assert event.wait(20)


def first(reply: Recorder) -> Event:
    """The picture of index 0; images of a request come in any order."""
    reply.wait()
    return next(event for event in reply.events if event.index == 0)


def test_requests_with_and_without_share_calls_and_do_not_notice(start: Start, tmp_path: Path) -> None:
    plain, _ = start(write_deployment(tmp_path / "plain", "fake"))
    whole = ask(plain).wait().events[0].data
    service, models = start()
    begun = threading.Event()
    models.before_unet = lambda call: hold(begun) if call == 1 else None
    cases: dict[str, dict[str, Any]] = {
        "none": {},
        "full": {"control_image": PICTURE},
        "half": {"control_image": PICTURE, "control_scale": 0.5},
        "no scale": {"control_image": PICTURE, "control_scale": 0.0},
        "other": {"control_image": OTHER, "num_images": 2},
    }
    replies = {name: ask(service, **values) for name, values in cases.items()}
    prepared = threading.Event()
    service._prepare.submit((1000.0,), prepared.set)
    assert prepared.wait(20)
    begun.set()
    found = {name: first(reply) for name, reply in replies.items()}
    assert max(models.rows) == 12
    assert found["none"].data == whole
    assert found["no scale"].data == whole
    assert len({one.data for one in found.values()}) == 4
    another, _ = start()
    for name, values in cases.items():
        alone = first(ask(another, **values))
        assert alone.data == found[name].data, name
        assert alone.info["control_scale"] == values.get("control_scale", 1.0)


def test_a_request_that_is_over_keeps_no_picture(start: Start) -> None:
    service, _ = start()
    image = Image.open(BytesIO(PICTURE)).convert("RGB")
    ask(service, control_image=encoded(image.resize((192, 192)))).wait()
    gc.collect()
    kept = [one for one in gc.get_objects() if issubclass(type(one), Image.Image | torch.Tensor)]
    every = (one.size if issubclass(type(one), Image.Image) else tuple(one.shape) for one in kept)
    sizes = {one for one in every if all(type(side) is int for side in one)}  # not of tensors that an export traced
    assert not {(192, 192), (3, 192, 192)} & sizes


@pytest.mark.parametrize("call", [0, 1, 3])
def test_the_picture_is_the_same_when_another_server_goes_on(
    start: Start, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a request that was not begun, with 0."""
    values: dict[str, Any] = {"control_image": encoded(picture(80, 100)), "control_scale": 0.75}
    values |= {"init_image": PICTURE, "strength": 0.9, "steps": 5}
    whole = ask(start()[0], **values).wait().events[0]
    if call:
        reply = drained_at(*start(), call, **values)
    else:
        service, _ = start()
        monkeypatch.setattr(service, "_prepare_waiting", lambda: None)
        reply = ask(service, **values)
        service.drain(0.0)
    (left,) = reply.wait().events
    assert left.kind == "snapshot"
    other = Recorder()
    start()[0].submit(GenerateRequest(prompt="", resume=left.data), other)
    (again,) = other.wait().events
    assert again.data == whole.data
    assert again.info["control_scale"] == 0.75
    (without,) = ask(start()[0], **{**values, "control_image": b"", "control_scale": 1.0}).wait().events
    assert without.data != whole.data


def test_a_snapshot_holds_the_control_once_and_packed(start: Start) -> None:
    flat = encoded(mask(64, 64).convert("RGB"))
    (plain,) = drained_at(*start(), 2, num_images=3).events
    (left,) = drained_at(*start(), 2, num_images=3, control_image=flat).events
    assert 0 < len(left.data) - len(plain.data) < 1000


def test_a_snapshot_is_of_no_use_where_the_controlnet_is_missing(start: Start, tmp_path: Path) -> None:
    (left,) = drained_at(*start(), 2, control_image=PICTURE).events
    other, _ = start(write_deployment(tmp_path / "plain", "fake", key="1"))
    with pytest.raises(DiffuserveError, match="another export of fake"):
        other.submit(GenerateRequest(prompt="", resume=left.data), Recorder())
