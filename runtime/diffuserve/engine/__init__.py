"""The step engine: pure decisions (StepPolicy), tensors (LatentPool) and the thread that joins them (DenoiseLoop)."""

from diffuserve.engine.loop import DenoiseLoop, LoopCheckpoint
from diffuserve.engine.policy import Candidate, StepPolicy
from diffuserve.engine.pool import LatentPool
from diffuserve.engine.track import Track

__all__ = ["Candidate", "DenoiseLoop", "LatentPool", "LoopCheckpoint", "StepPolicy", "Track"]
