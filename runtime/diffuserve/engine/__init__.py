"""The step engine: pure decisions (StepPolicy), tensors (LatentPool) and the thread that joins them (DenoiseLoop)."""

from diffuserve.engine.control import Control
from diffuserve.engine.costs import CALIBRATION_ROWS, Group, StepCosts
from diffuserve.engine.forecast import Demand, Forecast, Sharing, forecast
from diffuserve.engine.loop import DenoiseLoop, LoopCheckpoint, Trial
from diffuserve.engine.masked import Masked
from diffuserve.engine.policy import Candidate, Eta, Step, StepPolicy
from diffuserve.engine.pool import LatentPool
from diffuserve.engine.shares import Shares
from diffuserve.engine.track import HIDDEN_STATES, Track

__all__ = [
    "CALIBRATION_ROWS",
    "HIDDEN_STATES",
    "Candidate",
    "Control",
    "Demand",
    "DenoiseLoop",
    "Eta",
    "Forecast",
    "Group",
    "LatentPool",
    "LoopCheckpoint",
    "Masked",
    "Shares",
    "Sharing",
    "Step",
    "StepCosts",
    "StepPolicy",
    "Track",
    "Trial",
    "forecast",
]
