"""Carries out what Residency decides, on a thread beside the loop, and tells requests when they may run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Final, Protocol

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import ComponentFailedError, DiffuserveError
from diffuserve.registry import CheckpointRegistry
from diffuserve.residency import Action, Limits, Residency
from diffuserve.telemetry import Telemetry

__all__ = ["Keeper", "ModelControl", "Stay", "Unmanaged"]

_log: Final = logging.getLogger(__name__)

_REST_S: Final = 0.5


class ModelControl(Protocol):
    """Loads and unloads Triton models, each of which may take long. Called from the keeper's thread."""

    def load(self, model: str) -> None:
        """Return when it is loaded. Raises ComponentFailedError."""

    def unload(self, model: str) -> None:
        """Return when its memory is free. Raises ComponentFailedError."""

    def is_ready(self, model: str) -> bool: ...


class Unmanaged:
    """Models that are always there."""

    def load(self, model: str) -> None: ...

    def unload(self, model: str) -> None: ...

    def is_ready(self, model: str) -> bool:  # noqa: ARG002 - the port's signature
        return True


class Stay:
    """One request's claim on its checkpoint's components, from its admission to its end."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.is_inside = self.is_over = False
        #: Seconds that it waited for the components.
        self.waited = 0.0
        self.entered_at = 0.0
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failed: Callable[[DiffuserveError], None] = lambda _: None


class Keeper:
    """The components of all checkpoints of a registry.

    Nothing is asked of `control` before `open` is called. `pinned` names checkpoints that never leave.
    """

    def __init__(
        self,
        registry: CheckpointRegistry,
        control: ModelControl,
        limits: Limits,
        *,
        pinned: Collection[str] = (),
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._control, self._clock = registry, control, clock
        self._telemetry = telemetry or Telemetry()
        self._residency = Residency(limits)
        self._pinned = frozenset(pinned)
        self._waiting: list[Stay] = []
        self._errors: dict[str, DiffuserveError] = {}
        self._open = self._closed = False
        self._changed = threading.Condition()
        for checkpoint in registry.values():
            self._add(checkpoint)
        registry.listeners.append(self._on_registry)
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def open(self, *, at_once: bool = False) -> None:
        """Begin: find out what is in memory, on the keeper's thread or, `at_once`, before this returns."""
        if self._open:
            return
        self._open = True
        if at_once:
            self._survey()
        self._thread.start()

    def close(self) -> None:
        """End once what is under way has ended. Those that wait hear nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, name: str) -> None:
        """Raise UnsupportedError where a checkpoint can never be loaded, ComponentFailedError where it just failed."""
        with self._changed:
            self._residency.check(name)
            if self._residency.is_refused(name, self._clock()):
                error = self._errors[name]
                # A new one each time: one that is raised again remembers all who raised it, with their pictures.
                raise ComponentFailedError(error.message, **error.detail)

    def wait(self, name: str) -> float:
        """The seconds until a request that comes now may run, as far as can be told."""
        with self._changed:
            return self._residency.wait(name, self._clock())

    def enter(self, stay: Stay) -> None:
        """Call `stay.on_ready` when the components are there, at once where they are; or `stay.on_failed`."""
        with self._changed:
            if stay.is_over:
                return
            stay.entered_at = self._clock()
            stay.is_inside = self._residency.enter(stay.checkpoint, stay.entered_at)
            if not stay.is_inside:
                self._waiting.append(stay)
                self._changed.notify()
                return
        stay.on_ready()

    def leave(self, stay: Stay) -> None:
        """The request is over."""
        with self._changed:
            if stay.is_over:
                return
            stay.is_over = True
            if stay.is_inside:
                self._residency.leave(stay.checkpoint, self._clock(), inside=True)
            elif stay in self._waiting:
                self._waiting.remove(stay)
                self._residency.leave(stay.checkpoint, self._clock(), inside=False)
            self._changed.notify()

    def prove(self, name: str) -> None:
        """Return once a checkpoint's components are in memory. Raises DiffuserveError where they cannot be loaded."""
        self.check(name)
        stay, ended, errors = Stay(name), threading.Event(), list[DiffuserveError]()

        def failed(error: DiffuserveError) -> None:
            errors.append(error)
            ended.set()

        stay.on_ready, stay.on_failed = ended.set, failed
        self.enter(stay)
        ended.wait()
        self.leave(stay)
        if errors:
            raise errors[0]

    def hold(self, name: str) -> bool:
        """Keep a checkpoint's components from leaving until `let_go`, if they are there; whether they are."""
        with self._changed:
            if self._residency.is_open(name):
                self._residency.hold(name, 1)
                return True
            return False

    def let_go(self, name: str) -> None:
        with self._changed:
            self._residency.hold(name, -1)
            self._changed.notify()

    def is_there(self, name: str) -> bool:
        """Whether a checkpoint's components are in memory."""
        with self._changed:
            return self._residency.is_open(name)

    def may_use(self, model: str) -> bool:
        """Whether a Triton model is meant to be in memory."""
        with self._changed:
            return self._residency.may_use(model)

    def status(self) -> dict[str, Any]:
        """What there is to tell: of each checkpoint by name, and of memory in all."""
        with self._changed:
            now = self._clock()
            names = list(self._registry)
            checkpoints = {name: self._residency.status(name, now) for name in names}
            for name in names:
                if self._residency.is_refused(name, now):
                    checkpoints[name]["error"] = self._errors[name].message
            limits = self._residency.limits
            return {
                "checkpoints": checkpoints,
                "resident_bytes": self._residency.bytes,
                "memory_budget": limits.budget,
                "idle_release_s": limits.idle,
            }

    def _add(self, checkpoint: Checkpoint) -> None:
        models = {
            component.model: checkpoint.manifest.device_bytes(name)
            for name, component in checkpoint.manifest.components.items()
        }
        self._residency.add(checkpoint.name, models, pinned=checkpoint.name in self._pinned)

    def _on_registry(self, checkpoint: Checkpoint, is_there: bool) -> None:
        with self._changed:
            if is_there:
                self._add(checkpoint)
            else:
                self._residency.retire(checkpoint.name)
            self._changed.notify()

    def _survey(self) -> None:
        for name, checkpoint in self._registry.items():
            if all(self._control.is_ready(one.model) for one in checkpoint.manifest.components.values()):
                with self._changed:
                    self._residency.found(name, self._clock())
        self._report()

    def _run(self) -> None:
        surveyed = any(self._residency.is_open(name) for name in self._registry)
        while True:
            try:
                if not surveyed:
                    self._survey()
                    surveyed = True
                self._let_in()
                action = self._next()
                if action is not None:
                    self._act(action)
                elif self._closed:
                    return
            except Exception:
                _log.exception("the keeper of components failed; it goes on")
                with self._changed:  # what fails each time must not take a core
                    self._changed.wait_for(lambda: self._closed, _REST_S)

    def _next(self) -> Action | None:
        """The next action, waited for; None where it is time to look around, or to end."""
        with self._changed:
            if self._closed:
                return None
            action = self._residency.decide(self._clock())
            if action is None and not any(self._residency.is_open(one.checkpoint) for one in self._waiting):
                due = self._residency.due(self._clock())
                self._changed.wait(min(due + 0.001, 3600.0))
            return action

    def _let_in(self) -> None:
        with self._changed:
            entering = []
            for name in {one.checkpoint for one in self._waiting}:
                if self._residency.let_in(name):
                    entering += [one for one in self._waiting if one.checkpoint == name]
            self._waiting = [one for one in self._waiting if one not in entering]
            now = self._clock()
            for stay in entering:
                stay.is_inside, stay.waited = True, now - stay.entered_at
        for stay in entering:
            stay.on_ready()

    def _act(self, action: Action) -> None:
        began, done = self._clock(), list[str]()
        error: DiffuserveError | None = None
        _log.info("%sing %s", action.kind, action.checkpoint, extra={"checkpoint": action.checkpoint})
        try:
            for model in action.models:
                (self._control.load if action.kind == "load" else self._control.unload)(model)
                done.append(model)
        except DiffuserveError as raised:
            error = raised
        except Exception as raised:  # what is under way must end, or nothing is loaded any more
            _log.exception("a bug while models come and go")
            error = ComponentFailedError(f"{model}: {raised!r}")
        if error is not None:
            _log.error("%s cannot be %sed: %s", action.checkpoint, action.kind, error.message)
        if error is not None and action.kind == "load":
            for model in done:
                with suppress(Exception):
                    self._control.unload(model)
        self._done(action, self._clock() - began, error if action.kind == "load" else None)

    def _done(self, action: Action, seconds: float, error: DiffuserveError | None) -> None:
        name, failed = action.checkpoint, list[Stay]()
        with self._changed:
            self._residency.done(action, self._clock(), seconds, failed=error is not None)
            if error is not None:
                error = self._errors[name] = ComponentFailedError(
                    f"{name} cannot be loaded: {error.message.rstrip('.')}; export it again, or ask another checkpoint",
                    checkpoint=name,
                )
                failed = [one for one in self._waiting if one.checkpoint == name]
        if error is not None:
            self._telemetry.load_failed(name)
            for stay in failed:
                stay.on_failed(error)
                self.leave(stay)
        elif action.kind == "load":
            self._telemetry.loaded(name, seconds)
        else:
            self._telemetry.unloaded(name)
        self._report()

    def _report(self) -> None:
        with self._changed:
            now = self._clock()
            told = {name: self._residency.status(name, now) for name in self._registry}
            total = self._residency.bytes
        self._telemetry.resident({name: one["bytes"] * one["resident"] for name, one in told.items()}, total)
