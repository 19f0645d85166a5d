"""How a run computes if nobody says how: by device, and never against what was said."""

import json

import pytest
import torch

from fastdiff import train
from fastdiff.training import RunFolder, TrainConfig, UserError, precision

FAST = {"amp": "bf16", "channels_last": True}
PLAIN = {"amp": "off", "channels_last": False, "compile": False}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that nothing runs on: `parse` only asks what it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(precision.shutil, "which", lambda name: name)


def computed(*argv, **_):
    config = train.parse(list(argv))
    return {name: getattr(config, name) for name in PLAIN}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), {**FAST, "compile": False}),  # digits: 700 steps, done before it is compiled
        (("--steps", "5000"), {**FAST, "compile": True}),
        (("--data", "cifar10"), {**FAST, "compile": True}),
        (("--data", "cifar10", "--steps", "100"), {**FAST, "compile": False}),
        (("--data", "cifar10", "--fsdp"), {**FAST, "compile": False}),
        (("--data", "cifar10", "--device", "cuda:0"), {**FAST, "compile": True}),
        (("--data", "cifar10", "--device", "cpu"), PLAIN),
        (("--data", "cifar10", "--exact"), PLAIN),
        (("--data", "cifar10", "--amp", "off"), {**PLAIN, "channels_last": True, "compile": True}),
        (("--data", "cifar10", "--amp", "fp16"), {**FAST, "amp": "fp16", "compile": True}),
        (("--data", "cifar10", "--no-compile"), {**FAST, "compile": False}),
        (("--data", "cifar10", "--no-channels-last"), {"amp": "bf16", "channels_last": False,
                                                       "compile": True}),
    ],
)  # fmt: skip
def test_what_a_run_on_a_gpu_defaults_to(argv, expected):
    assert computed(*argv) == expected


def test_a_config_file_is_heard(tmp_path):
    path = tmp_path / "run.yaml"
    for text, expected in (
        ("exact: true", PLAIN),
        ("amp: off", {**FAST, "amp": "off", "compile": False}),
        ("steps: 9000", {**FAST, "compile": True}),
        ("device: cpu", PLAIN),
    ):
        path.write_text(text)
        assert computed("--config", str(path)) == expected, text
    path.write_text("exact: true")
    assert computed("--config", str(path), "--no-exact") == {**FAST, "compile": False}


def test_older_gpus_and_machines_without_a_compiler(monkeypatch):
    monkeypatch.setattr(precision.shutil, "which", lambda name: None)
    assert computed("--data", "cifar10") == {**FAST, "compile": False}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    assert computed("--data", "cifar10") == PLAIN
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computed("--data", "cifar10") == PLAIN


@pytest.mark.parametrize("flag", [("--amp", "bf16"), ("--channels-last",), ("--compile",)])
def test_exact_is_exact(flag):
    with pytest.raises(UserError, match="--exact does not go with --amp, --channels-last or"):
        train.parse(["--exact", *flag])


def test_a_resumed_run_computes_as_it_did(tmp_path):
    cases = {
        "fp32": (TrainConfig(), PLAIN),
        "fast": (TrainConfig(**FAST, compile=True), {**FAST, "compile": True}),
        "exact": (TrainConfig(exact=True), PLAIN),
        "mixed": (TrainConfig(amp="fp16"), {**PLAIN, "amp": "fp16"}),
    }
    for name, (config, expected) in cases.items():
        folder = RunFolder(tmp_path / name)
        folder.create(config)
        out = ("--out", str(folder.path), "--resume")
        assert computed(*out) == expected, name
        assert computed(*out, "--exact") == PLAIN, name
    with pytest.raises(UserError, match="--no-exact"):
        train.parse([*out[:1], str(tmp_path / "exact"), "--resume", "--amp", "bf16"])
    out = ("--out", str(tmp_path / "exact"), "--resume")
    assert computed(*out, "--no-exact", "--amp", "bf16") == {**PLAIN, "amp": "bf16"}
    # A run of an earlier version, which had no such setting.
    values = json.loads(TrainConfig().to_json())
    del values["exact"]
    (tmp_path / "fp32/config.json").write_text(json.dumps(values))
    assert computed("--out", str(tmp_path / "fp32"), "--resume") == PLAIN


def test_one_line_says_it():
    said = []
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    precision.say_what_was_chosen(TrainConfig(**FAST, compile=True), cuda, said.append)
    precision.say_what_was_chosen(TrainConfig(exact=True), cuda, said.append)
    precision.say_what_was_chosen(TrainConfig(), cpu, said.append)
    assert said == [
        "computing in bfloat16 (autocast), channels_last, compiled (which the first step waits "
        "for); --exact: float32, contiguous, not compiled",
        "computing in float32, contiguous, not compiled",
    ]


def test_convolutions_are_tried_out_unless_exact():
    flags = torch.backends.cudnn
    assert not flags.benchmark
    for config, device, expected in (
        (TrainConfig(), "cuda", True),
        (TrainConfig(exact=True), "cuda", False),
        (TrainConfig(), "cpu", False),
    ):
        with precision.fastest_convolutions(config, torch.device(device)):
            assert flags.benchmark == expected
        assert not flags.benchmark
