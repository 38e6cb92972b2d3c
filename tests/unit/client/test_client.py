"""What a client does with a server that behaves."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from diffuserve_client import (
    Client,
    Event,
    GenerateRequest,
    ImageEvent,
    InvalidArgumentError,
    PictureEvent,
    PreviewEvent,
    ProgressEvent,
    Timeout,
)
from diffuserve_client._events import typed
from unit.client.fake_triton import FakeTriton, image, picture, preview, progress, response


def test_one_image(client: Client, fake: FakeTriton) -> None:
    result = client.generate("a red circle", steps=4, width=64, guidance_scale=7.5, seed=5)
    assert fake.requests == [result.request]
    assert result.request == GenerateRequest(prompt="a red circle", steps=4, width=64, guidance_scale=7.5, seed=5)
    (only,) = result.images
    assert (only.index, only.seed, only.format, only.data) == (0, 7, "png", picture())
    assert only.info == {"sampler": "ddim"}
    assert result.image is only.image
    assert result.image.getpixel((0, 0)) == (255, 0, 0)


def test_a_request_object_is_sent_with_its_seed_drawn(client: Client, fake: FakeTriton) -> None:
    request = GenerateRequest(prompt="", negative_prompt="blue", sampler="euler", checkpoint="shapes", height=96)
    sent = client.generate(request).request
    assert sent == replace(request, seed=sent.seed)
    assert 0 <= sent.seed < 2**32
    assert fake.requests == [sent]
    seeded = replace(request, seed=5)
    assert client.generate(seeded).request is seeded


def test_a_request_object_takes_no_keywords_beside_it(client: Client, fake: FakeTriton) -> None:
    with pytest.raises(TypeError, match=r"^steps: a GenerateRequest holds every parameter"):
        client.generate(GenerateRequest(prompt="a"), steps=3)
    with pytest.raises(TypeError, match="stepz"):
        client.generate("a", stepz=3)  # type: ignore[call-arg]
    assert fake.requests == []


def test_several_images_come_in_order_whatever_the_server_finished_first(client: Client, fake: FakeTriton) -> None:
    def backwards(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        for index in reversed(range(request.num_images)):
            yield response(image(index, str(index).encode()), final=index == 0)

    fake.script = backwards
    result = client.generate("a", num_images=4)
    assert [(each.index, each.seed, each.data) for each in result.images] == [
        (0, 7, b"0"),
        (1, 8, b"1"),
        (2, 9, b"2"),
        (3, 10, b"3"),
    ]


def test_the_final_response_may_be_empty(client: Client, fake: FakeTriton) -> None:
    def empty_final(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(image())
        yield response(None, final=True)

    fake.script = empty_final
    assert len(client.generate("a").images) == 1


def test_on_progress_hears_every_step(client: Client, fake: FakeTriton) -> None:
    heard: list[Event] = []
    result = client.generate("a", steps=3, on_progress=heard.append)
    assert heard == [typed(progress(step, 3)) for step in (1, 2, 3)]
    assert all(isinstance(event, ProgressEvent) for event in heard)
    assert result.request.progress_every == 1


def test_on_preview_sees_every_step(client: Client, fake: FakeTriton) -> None:
    seen: list[PictureEvent] = []
    result = client.generate("a", steps=3, on_preview=seen.append)
    assert [(event.kind, event.step) for event in seen] == [("preview", 1), ("preview", 2), ("preview", 3)]
    assert seen[0].image.getpixel((0, 0)) == (0, 0, 255)
    assert seen[0].image is seen[0].image
    assert (result.request.preview_every, result.request.progress_every) == (1, 0)
    assert result.image.getpixel((0, 0)) == (255, 0, 0)
    client.generate("a", steps=6, preview_every=4, on_preview=seen.append)
    assert [event.step for event in seen[3:]] == [4]


@pytest.mark.parametrize("encoding", ["binary", "base64"])
def test_events_with_pictures_open_them(client: Client, fake: FakeTriton, encoding: str) -> None:
    def encoded(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        data = [picture("blue"), picture("red")]
        if encoding == "base64":
            data = [base64.b64encode(one) for one in data]
        yield response(progress(1, 2))
        yield response(preview(1, 2, data[0]))
        yield response(image(data=data[1]), final=True)

    fake.script = encoded
    request = GenerateRequest(prompt="a", image_encoding=encoding, preview_every=1, progress_every=1)
    told, small, whole = client.stream(request)
    assert not isinstance(told, PictureEvent)
    assert isinstance(small, PreviewEvent)
    assert isinstance(whole, ImageEvent)
    assert [one.image.getpixel((0, 0)) for one in (small, whole)] == [(0, 0, 255), (255, 0, 0)]


def test_on_progress_keeps_the_interval_that_is_asked_for(client: Client) -> None:
    heard: list[Event] = []
    client.generate(GenerateRequest(prompt="a", steps=5, progress_every=2), on_progress=heard.append)
    assert [event.step for event in heard] == [2, 4]


def test_progress_that_nobody_listens_to_is_dropped(client: Client) -> None:
    assert len(client.generate("a", steps=3, progress_every=1).images) == 1


def test_stream_yields_typed_events(client: Client) -> None:
    events = list(client.stream(GenerateRequest(prompt="a", steps=2, progress_every=1, num_images=2)))
    assert [(event.kind, event.step, event.index) for event in events] == [
        ("progress", 1, 0),
        ("progress", 2, 0),
        ("image", 0, 0),
        ("image", 0, 1),
    ]


def test_stream_takes_a_prompt_too(client: Client, fake: FakeTriton) -> None:
    assert [event.kind for event in client.stream("a", steps=2, progress_every=1, seed=5)] == ["progress"] * 2 + [
        "image"
    ]
    assert fake.requests == [GenerateRequest(prompt="a", steps=2, progress_every=1, seed=5)]


@pytest.mark.parametrize("image_encoding", ["binary", "base64"])
def test_data_is_the_encoded_picture_whatever_carried_it(client: Client, fake: FakeTriton, image_encoding: str) -> None:
    raw = picture("blue")

    def encoded(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        carried = base64.b64encode(raw) if request.image_encoding == "base64" else raw
        yield response(image(data=carried), final=True)

    fake.script = encoded
    result = client.generate("a", image_encoding=image_encoding)
    assert result.images[0].data == raw
    assert result.image.getpixel((0, 0)) == (0, 0, 255)


def test_a_picture_of_20_mb_passes(client: Client, fake: FakeTriton) -> None:
    data = bytes(20_000_000)

    def large(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(image(data=data), final=True)

    fake.script = large
    assert client.generate("a").images[0].data == data


def test_threads_share_a_client_and_get_their_own_pictures(client: Client, fake: FakeTriton) -> None:
    count = 12
    # Nobody is answered before all have asked, so all their streams are open at once.
    everyone = threading.Barrier(count)

    def own(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        everyone.wait(30)
        yield response(progress(1, request.steps))
        yield response(image(data=request.prompt.encode(), seed=request.seed), final=True)

    fake.script = own
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda n: client.generate(f"prompt {n}", seed=n), range(count)))
    assert [(each.images[0].data, each.images[0].seed) for each in results] == [
        (f"prompt {n}".encode(), n) for n in range(count)
    ]


def test_save_writes_the_picture_and_how_it_was_made(client: Client, tmp_path: Path) -> None:
    result = client.generate("a", init_image=b"a picture")
    (only,) = result.images
    assert only.save(tmp_path / "a.png") == tmp_path / "a.png"
    asked = replace(result.request, seed=7, sampler="ddim")
    assert GenerateRequest.from_image(tmp_path / "a.png", init_image=b"a picture") == asked
    assert only.save(str(tmp_path / "no suffix"), metadata=False).read_bytes() == only.data
    with PIL.Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "no suffix"]


def test_a_result_saves_all_its_pictures(client: Client, tmp_path: Path) -> None:
    result = client.generate("a", num_images=2, image_format="webp")
    paths = result.save(tmp_path / "a.webp")
    assert [path.name for path in paths] == ["a-0.webp", "a-1.webp"]
    assert [GenerateRequest.from_image(path).seed for path in paths] == [7, 8]
    (one,) = result.save(tmp_path / "a-1.webp", metadata=False)[1:]
    assert one.read_bytes() == result.images[1].data


def test_what_is_no_picture_is_saved_as_it_came(fake: FakeTriton, client: Client, tmp_path: Path) -> None:
    fake.script = lambda fake, request: iter([response(image(data=b"no picture"), final=True)])
    (path,) = client.generate("a").save(tmp_path / "a.png")
    assert path.read_bytes() == b"no picture"


def test_save_refuses_a_name_that_says_another_format(client: Client, tmp_path: Path) -> None:
    (only,) = client.generate("a", image_format="webp").images
    with pytest.raises(InvalidArgumentError, match=r"the picture is webp, and a\.jpg says jpeg"):
        only.save(tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing(client: Client, tmp_path: Path) -> None:
    (only,) = client.generate("a").images
    (tmp_path / "a.png").mkdir()
    with pytest.raises(IsADirectoryError):
        only.save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_number_is_the_total_timeout() -> None:
    with Client(timeout=12) as client:
        assert client.timeout == Timeout(total=12, connect=5)
        assert client.urls == ("localhost:8001",)
    with Client() as client:
        assert client.timeout == Timeout(total=300, connect=5)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_timeouts_are_finite(value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"total timeout is .* above 0 and finite"):
        Client(timeout=value)
    with pytest.raises(InvalidArgumentError, match="connect timeout"):
        Timeout(connect=value)


@pytest.mark.parametrize(
    "url",
    ["", "http://a:8001", "https://a:1", "grpc://a:1", "localhost", "a:", ":8001", "::1", "a:0", "a:99999"],
)
def test_an_address_is_host_and_port(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="must be host:port"):
        Client(url)


@pytest.mark.parametrize("url", ["a:1", "127.0.0.1:65535", "[::1]:8001", "dns:///a:8001", "unix:/run/triton.sock"])
def test_other_addresses_are_taken(url: str) -> None:
    Client(url).close()


def test_a_closed_client_says_so(client_class: Any, fake: FakeTriton) -> None:
    with client_class(fake.url) as client:
        client.generate("a")
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.generate("a")
    client.close()
