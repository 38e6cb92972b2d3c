"""Samplers as tables: a request's whole trajectory is made once, and the loop only multiplies."""

from diffuserve.sampling.compile import compile_trajectory
from diffuserve.sampling.compiler import TrajectoryCompiler
from diffuserve.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES, resolve_names
from diffuserve.sampling.samplers import SAMPLERS, SCHEDULES, Sampler, make_scheduler
from diffuserve.sampling.trajectory import HISTORY, CompileError, Trajectory

__all__ = [
    "HISTORY",
    "SAMPLERS",
    "SAMPLER_NAMES",
    "SCHEDULES",
    "SCHEDULE_NAMES",
    "CompileError",
    "Sampler",
    "Trajectory",
    "TrajectoryCompiler",
    "compile_trajectory",
    "make_scheduler",
    "resolve_names",
]
