from __future__ import annotations

import pytest

from diffuserve.spec import TARGET_DEVICES, device_kind
from diffuserve_export.options import TARGETS


def test_every_target_of_the_export_has_a_device() -> None:
    assert set(TARGETS) == set(TARGET_DEVICES)
    assert {device_kind([target]) for target in TARGETS} == {"cpu", "cuda"}


def test_one_loop_runs_on_one_kind_of_device() -> None:
    assert device_kind(["tensorrt", "onnxruntime", "tensorrt"]) == "cuda"
    with pytest.raises(ValueError, match=r"the targets onnxruntime-cpu, tensorrt need 2; export the checkpoints"):
        device_kind(["tensorrt", "onnxruntime-cpu"])
    with pytest.raises(ValueError, match=r"'openvino' is not one of onnxruntime-cpu, .*; export again"):
        device_kind(["openvino"])
