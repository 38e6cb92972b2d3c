"""Component models called, loaded and unloaded through Triton's business logic scripting."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from diffuserve import errors
from diffuserve.manifest import Component
from diffuserve.server.probe import Probe
from diffuserve.server.processes import ModelProcess

__all__ = ["BlsRunner"]

_LOADING_SECONDS: Final = 3600.0  # an engine of many gigabytes from a slow disk
_UNLOADING_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02

_log: Final = logging.getLogger(__name__)

#: What Triton says of a model that is not loaded: another thread loads it again, or a load failed.
_NOT_LOADED: Final = re.compile(r"Model '.*' is not ready")


class _NotThereError(errors.ComponentFailedError):
    """The Python backend's process of a component is gone, or the component is not loaded."""


class BlsRunner:
    """Runs component models by Triton's business logic scripting; outputs stay on the loop's device.

    A component whose process died is loaded again, and the call that found out is made again: no request is lost.
    Where it cannot be loaded, every call tries again.

    Refuses until `open` is called. Triton takes calls as soon as `initialize` returned, but makes what serves them
    a moment later: a call in between ends the server's process with a segmentation fault.

    `http_url` is where the server takes requests to load models, if it is known: a load that fails when this process
    asks for it damages the memory that it shares with Triton 24.10, and a few of them end the server.
    """

    def __init__(self, device: torch.device, http_url: str = "") -> None:
        self._device, self._open = device, False
        self._server = Probe(http_url, _LOADING_SECONDS) if http_url else None
        #: Whether a model is meant to be loaded; others are not loaded again.
        self.may_use: Callable[[str], bool] = lambda _: True
        #: What keeps a model's files from being loaded; empty where they are whole.
        self.lacking: Callable[[str], str] = lambda _: ""
        self._reviving, self._revived = threading.Lock(), dict[str, float]()
        self._options: dict[str, Any] = {}
        if device.type == "cuda":  # outputs go to the CPU's memory unless they are asked not to
            memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, device.index)
            self._options["preferred_memory"] = memory

    def open(self) -> None:
        self._open = True

    def run(
        self, component: Component, inputs: Mapping[str, torch.Tensor], *, trace: object | None = None
    ) -> dict[str, torch.Tensor]:
        if not self._open:
            raise errors.ComponentFailedError(
                f"{component.model} cannot be called while Triton makes this model's instance; try again in a moment",
                component=component.model,
            )
        began = time.monotonic()
        try:
            return self._called(component, inputs, trace)
        except _NotThereError as error:
            self._revive(component.model, began, error)
            return self._called(component, inputs, trace)

    def _called(
        self, component: Component, inputs: Mapping[str, torch.Tensor], trace: object | None
    ) -> dict[str, torch.Tensor]:
        request = pb_utils.InferenceRequest(
            model_name=component.model,
            requested_output_names=[output.name for output in component.outputs],
            inputs=[pb_utils.Tensor.from_dlpack(name, tensor.contiguous()) for name, tensor in inputs.items()],
            parameters=dict(trace) if isinstance(trace, Mapping) else {},
            **self._options,
        )
        try:
            response = request.exec()
        except Exception as error:
            raise errors.ComponentFailedError(
                f"{component.model} cannot be called: {error}", component=component.model
            ) from error
        if response.has_error():
            message = response.error().message()
            gone = errors.DEAD_PROCESS.search(message) or _NOT_LOADED.search(message)
            kind = _NotThereError if gone else errors.ComponentFailedError
            raise kind(f"{component.model} failed: {message}", component=component.model)
        return {tensor.name(): self._taken(component, tensor) for tensor in response.output_tensors()}

    def _revive(self, model: str, began: float, error: errors.ComponentFailedError) -> None:
        """Load a component again whose process died, unless that was done since the call that found out began.

        Triton never starts such a process again by itself.
        """
        if not self.may_use(model):
            raise error
        with self._reviving:
            if self._revived.get(model, 0.0) > began:
                return
            _log.error("%s is loaded again: %s", model, error.message)
            if lacks := self.lacking(model):
                raise errors.ComponentFailedError(f"{error.message.rstrip('.')}; {lacks}", component=model) from error
            try:
                pb_utils.unload_model(model_name=model)
                self._load(model)
            except Exception as cause:
                raise errors.ComponentFailedError(
                    f"{error.message.rstrip('.')}; loading it again failed: {cause}", component=model
                ) from cause
            self._revived[model] = time.monotonic()

    def load(self, model: str) -> None:
        """Load a component that is not loaded. Raises ComponentFailedError."""
        if lacks := self.lacking(model):
            raise errors.ComponentFailedError(f"{model}: {lacks}", component=model)
        with self._reviving:
            try:
                self._load(model)
            except Exception as cause:
                raise errors.ComponentFailedError(f"{model}: {_told(cause)}", component=model) from cause

    def _load(self, model: str) -> None:
        """Load a model over HTTP where that can be. Raises what it fails with."""
        if self._server is not None:
            reason = self._server.load(model)
            if reason:
                raise errors.ComponentFailedError(reason, component=model)
            if reason is not None and self.is_ready(model):
                return
            _log.warning("the HTTP address given names no server that loads %s here; it is loaded without", model)
        pb_utils.load_model(model_name=model)

    def unload(self, model: str) -> None:
        """Unload a component; its process has ended when this returns. Raises ComponentFailedError."""
        process = ModelProcess(os.getpgrp(), model)
        process.is_gone()  # which looks for it now
        with self._reviving:
            try:
                pb_utils.unload_model(model_name=model)
            except Exception as cause:
                raise errors.ComponentFailedError(f"{model}: {_told(cause)}", component=model) from cause
        deadline = time.monotonic() + _UNLOADING_SECONDS
        while process.was_seen and not process.is_gone() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # Triton's child and not ours: its end cannot be awaited

    def is_ready(self, model: str) -> bool:
        return bool(pb_utils.is_model_ready(model_name=model))

    def _taken(self, component: Component, tensor: Any) -> torch.Tensor:
        """An output as torch's tensor, once it is known to be on the loop's device."""
        taken = from_dlpack(tensor.to_dlpack())
        if taken.device != self._device:
            raise errors.ComponentFailedError(
                f"{component.model} gave {tensor.name()} on {taken.device}, and the loop steps on {self._device}: "
                "give the model an instance on that device (instance_group, gpus), and Triton enough of its memory "
                "(--cuda-memory-pool-byte-size)",
                component=component.model,
                output=tensor.name(),
            )
        return taken


def _told(error: Exception) -> str:
    """Triton's words of why a model does not load, in one line."""
    return " ".join(str(error).split())
