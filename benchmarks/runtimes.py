"""A U-Net as other CPU runtimes run it, for the sampling benchmarks.

All get the weights of ours, by way of `UNet.to_diffusers()`, and have a model of one shape.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

Model = Callable[[Tensor, Tensor], Tensor]
OPENVINO, ONNXRUNTIME = "openvino", "onnxruntime"
PACKAGES = {OPENVINO: ("openvino",), ONNXRUNTIME: ("onnxruntime", "onnxscript")}


def missing(runtime: str) -> str | None:
    """The package that a runtime lacks here, or None."""
    return next((p for p in PACKAGES[runtime] if importlib.util.find_spec(p) is None), None)


class Sample(nn.Module):
    """A UNet2DModel that returns a tensor, for exporters."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet.eval().requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t, return_dict=False)[0]


def openvino(unet: nn.Module, x_t: Tensor, t: Tensor, threads: int, dtype: torch.dtype) -> Model:
    """OpenVINO's CPU plugin, hinted to latency and to compute in `dtype`."""
    import openvino

    program = torch.export.export(Sample(unet).eval(), (x_t, t))
    model = openvino.convert_model(program)  # of the program's memory
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    # The result lies in memory that the next call writes to.
    return lambda x, t: torch.from_numpy(compiled([x.numpy(), t.numpy()])[0].copy())


def onnxruntime(unet: nn.Module, x_t: Tensor, t: Tensor, threads: int) -> Model:
    """onnxruntime's CPU provider with all of its optimizations, float32."""
    import onnxruntime

    program = torch.onnx.export(Sample(unet).eval(), (x_t, t), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    x_name, t_name = (value.name for value in session.get_inputs())
    return lambda x, t: torch.from_numpy(
        session.run(None, {x_name: x.numpy(), t_name: t.numpy()})[0]
    )


def inductor(unet: nn.Module, x_t: Tensor, t: Tensor, *, freezing: bool) -> Model:
    """torch.compile; with `freezing`, weights are constants that Inductor reorders once."""
    import torch._inductor.config as config

    torch.compiler.reset()
    compiled = torch.compile(Sample(unet), dynamic=False)
    with config.patch(freezing=freezing), torch.no_grad():
        compiled(x_t, t)
    return torch.no_grad()(lambda x, t: compiled(x, t))
