"""The tables of one checkpoint, made when they are first asked for."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from diffuserve.errors import DiffuserveError, UnsupportedError
from diffuserve.sampling.compile import compile_trajectory
from diffuserve.sampling.names import resolve_names
from diffuserve.sampling.samplers import SAMPLERS, check_choice, own_scheduler, remake_scheduler
from diffuserve.sampling.trajectory import CompileError, Trajectory

__all__ = ["TrajectoryCompiler"]

CACHED_TRAJECTORIES: Final = 512


class TrajectoryCompiler:
    """Makes and caches the tables of one checkpoint. Safe to call from several threads."""

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        self._own = own_scheduler(scheduler_config)
        self._text = json.dumps(dict(scheduler_config), sort_keys=True)
        #: The sampler that the checkpoint's own scheduler is, or None where it has no name here.
        self.default = _name_of(self._own)
        self._compiled = lru_cache(maxsize=CACHED_TRAJECTORIES)(self._compile)
        self._scheduler = lru_cache(maxsize=len(SAMPLERS))(self._make)

    @property
    def prediction_type(self) -> str:
        """What the model predicts: epsilon, v_prediction or sample."""
        return str(self._own.config.get("prediction_type", "epsilon"))

    def samplers(self, steps: int) -> tuple[str, ...]:
        """The samplers that can be had at that many steps, with the checkpoint's own schedule."""
        return _compiled_samplers(self._text, steps)

    def choose(self, sampler: str | None, schedule: str | None = None, eta: float = 0.0) -> tuple[str, str | None]:
        """The names of the sampler, the checkpoint's own for None, and of the sigma schedule, None for its own.

        Raises InvalidArgumentError for a name that is not known, UnsupportedError for a combination that diffusers
        does not have.
        """
        named, schedule = resolve_names(sampler, schedule)
        name = named or self.default
        if name is None:
            raise UnsupportedError(
                f"the checkpoint's own scheduler {type(self._own).__name__} is not built; "
                f"give a sampler: {', '.join(SAMPLERS)}"
            )
        check_choice(self._own.config, SAMPLERS[name], schedule, eta)
        return name, schedule

    def __call__(
        self,
        sampler: str | None,
        steps: int,
        schedule: str | None = None,
        eta: float = 0.0,
        strength: float | None = None,
    ) -> Trajectory:
        """The table, which takes some milliseconds the first time; with `strength` it begins at a given picture.

        Raises CompileError where it cannot be made.
        """
        name, schedule = self.choose(sampler, schedule, eta)
        compiled = self._compiled(name, steps, schedule, eta, strength)
        if isinstance(compiled, CompileError):
            raise CompileError(compiled.message, **compiled.detail)
        return compiled

    def _compile(
        self, name: str, steps: int, schedule: str | None, eta: float, strength: float | None
    ) -> Trajectory | CompileError:
        sampler = SAMPLERS[name]
        options = {"eta": eta} if sampler.takes_eta else {}
        try:
            scheduler = copy.deepcopy(self._scheduler(name, schedule))
            return compile_trajectory(scheduler, steps, name, schedule=schedule, strength=strength, **options)
        except CompileError as error:
            # Kept, so that a refusal costs its time once; without the traceback and what that holds.
            return CompileError(error.message, **error.detail)

    def _make(self, name: str, schedule: str | None) -> Any:
        try:
            return remake_scheduler(self._own, SAMPLERS[name], schedule)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise CompileError(
                f"diffusers' {SAMPLERS[name].scheduler_class} does not take the checkpoint's config: {error}; "
                "choose another sampler",
                sampler=name,
            ) from error


@lru_cache(maxsize=64)
def _compiled_samplers(config: str, steps: int) -> tuple[str, ...]:
    """Of a scheduler's config as JSON, which many checkpoints share; 0.1 s where it was not asked for before."""
    compiler = TrajectoryCompiler(json.loads(config))
    return tuple(name for name in SAMPLERS if _compiles(compiler, name, steps))


def _compiles(compiler: TrajectoryCompiler, name: str, steps: int) -> bool:
    try:
        compiler(name, steps)
    except DiffuserveError:
        return False
    return True


def _name_of(scheduler: Any) -> str | None:
    """The sampler whose class and config values the scheduler has."""
    for sampler in SAMPLERS.values():
        values = {option: scheduler.config.get(option) for option in sampler.config}
        if sampler.scheduler_class == type(scheduler).__name__ and values == sampler.config:
            return sampler.name
    return None
