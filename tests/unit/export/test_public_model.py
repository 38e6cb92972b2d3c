from __future__ import annotations

from pathlib import Path

import pytest
import typer
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from diffuserve.wire import INPUTS, OUTPUTS
from diffuserve_export.public_model import main, public_config

REPOSITORY = Path(__file__).parents[3] / "model_repository"


def test_the_committed_file_is_current() -> None:
    main(REPOSITORY, check=True)


def test_it_says_what_the_wire_says() -> None:
    config = text_format.Parse(public_config(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("diffusion", "python", 0)
    assert config.model_transaction_policy.decoupled
    for found, specs in ((config.input, INPUTS), (config.output, OUTPUTS)):
        types = [model_config_pb2.DataType.Name(one.data_type).removeprefix("TYPE_") for one in found]
        assert [(one.name, tuple(one.dims)) for one in found] == [(spec.name, spec.shape) for spec in specs]
        assert types == [spec.datatype.replace("BYTES", "STRING") for spec in specs]
    assert [one.name for one in config.input if not one.optional] == ["prompt"]
    assert config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "yes"


def test_on_a_gpu_only_tensors_may_stay_there() -> None:
    config, gpu = (text_format.Parse(public_config(gpu=gpu), model_config_pb2.ModelConfig()) for gpu in (False, True))
    assert gpu.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
    gpu.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "yes"
    assert gpu == config


def test_a_changed_or_missing_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        main(tmp_path, check=True)
    main(tmp_path)
    main(tmp_path, check=True)
    path = tmp_path / "diffusion" / "config.pbtxt"
    path.write_text(path.read_text().replace("decoupled: true", "decoupled: false"))
    with pytest.raises(typer.Exit) as exit_info:
        main(tmp_path, check=True)
    assert exit_info.value.exit_code == 1
