"""The public model. All of it is in diffuserve.triton, where it can be typed and tested."""

from diffuserve.triton import DiffusionModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
