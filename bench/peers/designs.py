"""The peers by the letters that the tables use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from peers.bls import bls_batched, bls_published
from peers.common import Places, Serve
from peers.locked import locked
from peers.lockstep import lockstep
from peers.serial import serial

__all__ = ["PEERS", "Peer", "Places", "Serve"]


@dataclass(frozen=True)
class Peer:
    """One design: how tables call it, and how it is opened."""

    name: str
    open: Callable[[Places], AbstractContextManager[Serve]]


PEERS: Final = {
    "a": Peer("(a) diffusers behind a lock", locked),
    "b": Peer("(b) diffusers, lockstep batches", lockstep),
    "c1": Peer("(c1) a BLS loop a request, batched UNet", bls_batched),
    "c2": Peer("(c2) a BLS loop, as published", bls_published),
    "d": Peer("(d) ONNX Runtime behind a lock", serial),
}
