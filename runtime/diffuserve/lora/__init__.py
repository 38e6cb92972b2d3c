"""LoRA adapters as an input of the engines, so that requests with different ones share a batch.

An engine takes `lora` [adapters, P], in its own precision, and `lora_index` INT64 [rows]: which adapter a row uses.
Adapter 0 is all zeros, and means none. `layout` knows what the P numbers of an adapter are.
"""

from diffuserve.lora.layout import LoraFactors, LoraLayout, LoraTarget

__all__ = ["LoraFactors", "LoraLayout", "LoraTarget"]
