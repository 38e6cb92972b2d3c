"""Samplers as tables: a request's whole trajectory is made once, and the loop only multiplies."""

from diffuserve.sampling.compile import CompileError, TrajectoryCompiler, compile_trajectory
from diffuserve.sampling.samplers import SAMPLERS, Sampler, make_scheduler
from diffuserve.sampling.trajectory import HISTORY, Trajectory

__all__ = [
    "HISTORY",
    "SAMPLERS",
    "CompileError",
    "Sampler",
    "Trajectory",
    "TrajectoryCompiler",
    "compile_trajectory",
    "make_scheduler",
]
