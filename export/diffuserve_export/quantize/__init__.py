"""UNets in int8, fp8 and int4: scales found by ModelOpt in the denoising loop, Q/DQ in the graph, a gate on pictures.

Importing this package loads neither torch nor ModelOpt.
"""

from __future__ import annotations

from diffuserve_export.quantize.options import QuantizeOptions, QuantizePlan, plan_quantization

__all__ = ["QuantizeOptions", "QuantizePlan", "plan_quantization"]
