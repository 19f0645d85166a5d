"""None, lists, arrays and the like in place of every argument of every public op: TypeError.

Where None is a value, and the few names and flags that take no tensor, are said below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_harness.raw_arguments import arguments

import fastdiff
from fastdiff import ops

TABLE = torch.ones(10)
X = torch.ones(2, 4, 3, 3)
T = torch.tensor([1, 2])
_step = {k: v.float() if k == "table" else v for k, v in arguments("ddim_step").items()}
STEP = {"x_t": X, "model_output": X, "step": torch.tensor([1, 0]), "table": _step["table"]}
STEP |= {"clip": True, "uncond": X, "guidance_scale": 1.0, "noise": X, "stream": 0}
STEP |= {"return_pred_x0": False, "prediction": "eps"}
VLB_TABLE = arguments("vlb_terms")["table"].float()

CALLS: dict[str, dict[str, Any]] = {
    "q_sample": {
        "x0": X,
        "t": T,
        "sqrt_alpha_bar": TABLE,
        "sqrt_one_minus_alpha_bar": TABLE,
        "noise": X,
        "stream": 0,
        "flip": T > 1,
        "dtype": torch.float32,
    },
    "eps_loss": {
        "prediction": X,
        "noise": X,
        "stream": 0,
        "weight": torch.ones(2),
        "reduction": "mean",
        "kind": "mse",
    },
    "posterior_mean": {"x0": X, "x_t": X, "t": T, "coef_x0": TABLE, "coef_x_t": TABLE},
    "posterior_mean_variance": {
        "x0": X,
        "x_t": X,
        "t": T,
        "coef_x0": TABLE,
        "coef_x_t": TABLE,
        "variance": TABLE,
        "log_variance": TABLE,
    },
    "vlb_terms": {
        "x0": X,
        "x_t": X,
        "model_output": X,
        "t": T,
        "table": VLB_TABLE,
        "noise": X,
        "stream": 0,
        "prediction": "eps",
        "variance": "fixed_large",
        "clip": True,
        "detach_mean": False,
    },
    "ddim_step": {**STEP, "use_clipped_model_output": True},
    "ddpm_step": {**STEP, "learned_range": False},
    "group_norm_silu": {
        "x": X,
        "num_groups": 2,
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "eps": 1e-5,
        **{name: torch.ones(2, 4) for name in ("channel_bias", "scale", "shift")},
        "activation": "silu",
    },
    "philox_normal": {"shape": (2, 3), "seed": 0, "stream": 0, "dtype": torch.float32},
}
# None says that there is none; of noise, that it is made from the seed, which is missing here.
OPTIONAL = ("flip", "dtype", "weight", "bias", "channel_bias", "scale", "shift", "uncond", "noise")
# As everywhere in Python None is not true; kernels take it for False.
FLAGS = ("clip", "return_pred_x0", "use_clipped_model_output", "learned_range", "detach_mean")
# Of a choice every other value is a wrong value.
CHOICES = ("reduction", "kind", "prediction", "variance", "activation")

WRONG = {
    "None": None,
    "a list": [1.0, 2.0],
    "an array": np.ones((2, 4, 3, 3), dtype=np.float32),
    "text": "eight",
    "an object": object(),
    "a dict": {},
}


def cases() -> list[Any]:
    return [
        pytest.param(op, name, wrong, id=f"{op}-{name}-{label}")
        for op, given in CALLS.items()
        for name in given
        for label, wrong in WRONG.items()
        if not (wrong is None and name in (*OPTIONAL, *FLAGS))
        and not (label == "text" and name in CHOICES)
        and (op, name, label) != ("philox_normal", "shape", "a dict")
    ]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("op", "name", "wrong"), cases())
def test_wrong_type(op: str, name: str, wrong: object, backend: str | None) -> None:
    def call() -> object:
        given = CALLS[op] | {name: wrong}
        function: Callable = getattr(ops, op)
        if backend is None:
            return function(**given)
        with fastdiff.use_backend(backend):
            return function(**given)

    errors = (TypeError, ValueError) if name in (*CHOICES, "variance", "shape") else TypeError
    with pytest.raises(errors, match=name):
        call()


# Of a tensor in place of another one; nested ones may call their layout strided.
LAYOUTS = {
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "layout torch._mkldnn"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x.reshape(-1)], layout=torch.jagged),
        "nested",
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layouts_that_are_not_dense(op: str, layout: str, backend: str | None) -> None:
    make, message = LAYOUTS[layout]
    for name, x in CALLS[op].items():
        if not isinstance(x, torch.Tensor):
            continue
        given = CALLS[op] | {name: make(x)}
        function: Callable = getattr(ops, op)
        with fastdiff.use_backend(backend or "cpu"), pytest.raises(TypeError, match=message):
            function(**given)
