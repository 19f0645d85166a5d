import dataclasses
import json
import os
from pathlib import Path

import pytest

from fastdiff.training import TrainConfig, UserError
from fastdiff.training.config_file import read_config_file


def test_defaults_are_those_of_digits_and_every_recipe_is_valid():
    assert TrainConfig.for_data("digits") == TrainConfig()
    for data in ("digits", "fashion-mnist", "cifar10", "some/folder"):
        TrainConfig.for_data(data).validate()
    cifar10 = TrainConfig.for_data("cifar10")
    # DDPM's recipe, Math §11.
    assert (cifar10.lr, cifar10.warmup, cifar10.batch_size) == (2e-4, 5000, 128)
    assert (cifar10.grad_clip, cifar10.ema, cifar10.flip) == (1.0, (0.9999,), True)
    assert cifar10.variance == "fixed_large"


def test_run_folder_is_named_after_the_data():
    assert str(TrainConfig().run_folder) == "runs/digits"
    assert str(TrainConfig(data="pictures/cats.npz").run_folder) == "runs/cats"
    assert str(TrainConfig(out="here").run_folder) == "here"
    assert str(TrainConfig(data="pictures/cats.v2/").run_folder) == "runs/cats.v2"
    for data in ("x" * 300, "hf:user/" + "\U0001d4cd" * 300):  # which no file can be called
        assert not TrainConfig.for_data(data).run_folder.exists()


@pytest.mark.parametrize(("data", "name"), [(".", "kittens"), ("..", "cats"), ("../b", "b")])
def test_a_run_on_a_relative_folder_has_that_folder_s_name(tmp_path, monkeypatch, data, name):
    (tmp_path / "cats/kittens").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cats/kittens")
    assert str(TrainConfig(data=data).run_folder) == f"runs/{name}"


def test_json_round_trip_keeps_everything_but_resume():
    config = TrainConfig(lr=3e-4, data_dir="x", class_cond=True, resume=True)
    again = TrainConfig().updated(json.loads(config.to_json()), "config.json")
    assert again == dataclasses.replace(config, resume=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr": "1e-3"}, {"lr": 1e-3}),  # YAML 1.1 reads 1e-3 as a string
        ({"lr": 1}, {"lr": 1.0}),
        ({"batch-size": 32}, {"batch_size": 32}),
        ({"steps": 1e3}, {"steps": 1000}),
        ({"amp": False}, {"amp": "off"}),  # and `off` as false
        ({"image_size": None}, {"image_size": None}),
        ({"image_size": 64}, {"image_size": 64}),
        ({"ema": 0.9}, {"ema": (0.9,)}),
        ({"ema": ["0.9", 0]}, {"ema": (0.9, 0.0)}),
    ],
)
def test_values_from_files_are_converted(values, expected):
    config = TrainConfig().updated(values, "file")
    for name, value in expected.items():
        assert getattr(config, name) == value
        assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, r"file: unknown setting 'learning_rate'; valid: .*\blr\b"),
        ({"steps": "many"}, "file: steps: expected int, got 'many'"),
        ({"steps": 1.5}, "file: steps: expected int"),
        ({"steps": True}, "file: steps: expected int"),
        ({"class_cond": "yes"}, "file: class_cond: expected bool"),
        ({"amp": "fp8"}, "file: amp: expected one of off, bf16"),
        ({"data": 3}, "file: data: expected str"),
        ({"ema": [0.9, "x"]}, "file: ema: expected float, got 'x'"),
    ],
)
def test_wrong_values_from_files_are_named(values, message):
    with pytest.raises(UserError, match=message):
        TrainConfig().updated(values, "file")


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"data": ""}, '--data "": give one of digits, '),
        ({"steps": 0}, "--steps 0"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"ema": (0.9, 1.5)}, "--ema 0.9 1.5: give different numbers in"),
        ({"ema": (0.9, 0.9)}, "--ema 0.9 0.9: give different"),
        ({"ema": ()}, "--ema : give"),
        ({"warmup": -1}, "--warmup -1"),
        ({"seed": -1}, "--seed -1"),
        ({"label_dropout": 1.5}, "--label-dropout 1.5"),
        ({"batch_size": 10, "grad_accum": 3}, "--grad-accum 3"),
        ({"sample_steps": 2000}, "--sample-steps 2000"),
        ({"image_size": 0}, "--image-size 0"),
        ({"fsdp": True, "compile": True}, "--fsdp does not go with --compile"),
    ],
)
def test_impossible_settings_are_named(change, flag):
    with pytest.raises(UserError) as error:
        TrainConfig(**change).validate()
    assert str(error.value).startswith(flag)


def test_only_settings_that_change_the_result_break_resuming():
    saved = TrainConfig()
    longer = TrainConfig(steps=9999, device="cpu", threads=2, out="x", lr=1e-5, resume=True)
    assert longer.changes_that_break_resuming(saved) == []
    other = TrainConfig(batch_size=7, schedule="linear")
    changes = " ".join(other.changes_that_break_resuming(TrainConfig(schedule="jsd")))
    assert "--batch-size 7" in changes
    assert "--schedule linear (the run has jsd)" in changes


def test_config_files_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nclass-cond: true\n")
    assert read_config_file(path) == {"lr": "1e-4", "class-cond": True}
    path.write_text('{"lr": 0.5}')
    assert read_config_file(path) == {"lr": 0.5}
    path.write_text("")
    assert read_config_file(path) == {}
    for content in ("- a\n- b\n", "a: [", "!!python/object/apply:os.getpid []"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"--config .*run\.yaml"):
            read_config_file(path)
    with pytest.raises(UserError, match="No such file"):
        read_config_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.toml", b"\xef\xbb\xbflr = 0.5\r\n"),
        ("upper.TOML", b"lr = 0.5"),
        ("mark.yaml", b"\xef\xbb\xbflr: 0.5\r\n"),
        ("mark.json", b'\xef\xbb\xbf{"lr": 0.5}'),
    ],
)
def test_what_windows_editors_write_is_read(tmp_path, name, content):
    if name.lower().endswith("toml"):
        pytest.importorskip("tomllib")
    (tmp_path / name).write_bytes(content)
    assert read_config_file(tmp_path / name) == {"lr": 0.5}


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1".encode("utf-16"), "is UTF-16 or no text at all; save it as UTF-8"),
        ("lr: 1".encode("utf-16-be"), "is UTF-16 or no text at all; save it as UTF-8"),
        ("lr: 1".encode("utf-32"), "is UTF-16 or no text at all; save it as UTF-8"),
        ("# a\n# caf\u00e9".encode("latin-1"), "line 2 is not UTF-8; save it as UTF-8"),
        (b"#" * (2 << 20), "larger than 1048576 bytes"),
        # What a parser builds from a value, not the parser, refuses these.
        (b"lr: " + b"9" * 5000, "not valid"),
        (b"lr = " + b"9" * 5000, "not valid|expected settings"),
        (b"lr: 2026-99-99", "not valid"),
        (b"lr = 2026-99-99", "not valid|expected settings"),
        (b"? [a, {b: c}]\n: 1", "not valid"),
        (b"a: \x1b[31m\n", "not valid"),
    ],
)
def test_files_that_hold_no_settings_say_what_to_do(tmp_path, suffix, content, message):
    if suffix == "toml":
        pytest.importorskip("tomllib")
    path = tmp_path / f"run.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_config_file(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000


def test_config_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, message in (
        (tmp_path / "pipe.yaml", "a pipe or device"),
        ("/dev/zero", "a pipe or device"),
        (tmp_path, "is a folder"),
        ("x" * 300, "name too long"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(UserError, match=message):
            read_config_file(path)


def test_a_config_file_is_never_waited_for(tmp_path, monkeypatch):
    """The kernel's log is a regular file whose reader waits for the next message."""
    (tmp_path / "run.yaml").write_text("lr: 0.5")
    opened = {}

    def spy(path, flags, *rest, original=os.open):
        opened[Path(path).name] = flags
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", spy)
    assert read_config_file(tmp_path / "run.yaml") == {"lr": 0.5}
    assert opened["run.yaml"] & os.O_NONBLOCK
