"""Model repositories of tk export --triton come in; whether Triton would understand them goes out: each config.pbtxt is
parsed by protobuf with Triton's own messages, and its inputs and outputs are those of the graph beside it in ONNX Runtime,
which runs the warm-up and a batch. Needs the packages tritonclient[grpc] and onnxruntime.

    python scripts/check_triton.py REPOSITORY...
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

KINDS = {"tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
KINDS["tensor(float16)"] = "TYPE_FP16"
NUMPY = {"TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16}


def check(folder):
    config = text_format.Parse((folder / "config.pbtxt").read_text(), triton.ModelConfig())
    assert config.name == folder.name and config.backend == "onnxruntime", config.name
    session = onnxruntime.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])

    def declared(values):
        return [(v.name, triton.DataType.Name(v.data_type), list(v.dims)) for v in values]

    def found(values):
        dims = lambda v: [n if isinstance(n, int) else -1 for n in v.shape[1:]]  # noqa: E731
        return [(v.name, KINDS[v.type], dims(v)) for v in values]

    assert declared(config.input) == found(session.get_inputs()), declared(config.input)
    assert declared(config.output) == found(session.get_outputs()), declared(config.output)
    (warm_up,) = config.model_warmup
    assert set(warm_up.inputs) == {v.name for v in config.input}
    for batch in (1, config.max_batch_size):
        zeros = {
            name: np.zeros([batch, *v.dims], NUMPY[triton.DataType.Name(v.data_type)])
            for name, v in warm_up.inputs.items()
        }
        for value, of in zip(session.run(None, zeros), config.output):
            wanted = [batch, *of.dims]
            assert len(value.shape) == len(wanted), (of.name, value.shape)
            assert all(n in (-1, m) for n, m in zip(wanted, value.shape)), (of.name, value.shape)
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        for end in ("min", "opt", "max"):
            shapes = dict(s.split(":") for s in accelerator.parameters[f"trt_profile_{end}_shapes"].split(","))
            assert list(shapes) == [v.name for v in config.input], shapes
    print(f"{folder}: understood")


for repository in sys.argv[1:]:
    folders = sorted(path.parent for path in Path(repository).glob("*/config.pbtxt"))
    assert folders, f"{repository} holds no model"
    for folder in folders:
        check(folder)
