"""TensorRT-RTX under TensorRT's name: what Polygraphy asks of the one is there in the other.

Only a builder's configuration differs: without a GPU it must be told for which card it builds.
"""

from __future__ import annotations

from typing import Any

import tensorrt_rtx

globals().update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
__version__ = "10.13.3"


class Builder(tensorrt_rtx.Builder):  # type: ignore[misc]
    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config
