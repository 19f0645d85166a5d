"""`python -m fastdiff.train`, through its real front door."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from fastdiff import _backends, _cli, train
from fastdiff.diffusion.losses import LOSSES
from fastdiff.diffusion.schedules import SCHEDULES
from fastdiff.diffusion.step_tables import VARIANCES
from fastdiff.diffusion.timestep_samplers import TIMESTEP_SAMPLERS
from fastdiff.diffusion.weightings import WEIGHTINGS
from fastdiff.nn import PRESETS
from fastdiff.reference.step_columns import PREDICTIONS
from fastdiff.training import TrainConfig, load_run

FLAGS = ["--preset", "tiny", "--steps", "6", "--batch-size", "8", "--timesteps", "20"]
FLAGS += ["--sample-steps", "2", "--num-samples", "4", "--log-every", "2", "--device", "cpu"]


@pytest.fixture
def run_train(monkeypatch, capfd, tmp_path):
    """Call the command in this process; gives (exit code, stderr)."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff.train", *argv])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(train.PROGRAM, train.main, train.NEEDS)
        return stopped.value.code, capfd.readouterr().err

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_one_line(result: tuple[int, str], *fragments: str) -> None:
    code, error = result
    assert code == 2
    assert error.startswith("python -m fastdiff.train: error: ")
    assert error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error


def test_a_run_resumes_and_is_never_overwritten(run_train, tmp_path):
    assert run_train(*FLAGS)[0] == 0
    folder = tmp_path / "runs/digits"
    config = json.loads((folder / "config.json").read_text())
    assert (config["preset"], config["steps"], config["data"]) == ("tiny", 6, "digits")
    before = contents(folder)

    # The same command again, and another architecture or schedule with --resume, change nothing.
    assert_one_line(run_train(*FLAGS), "--out runs/digits exists", "--resume")
    other = ("--preset", "digits", "--schedule", "linear")
    assert_one_line(
        run_train("--resume", *other),
        "--preset digits (the run has tiny)",
        "--schedule linear (the run has cosine)",
    )
    assert contents(folder) == before

    # Settings come from the run itself; more steps and another way to compute are allowed.
    assert torch.get_num_threads() == 1
    code, error = run_train("--resume", "--steps", "8", "--threads", "2")
    assert code == 0
    assert torch.get_num_threads() == 2
    assert "continuing runs/digits at step 6" in error
    assert (folder / "checkpoints/step-00000008").is_dir()
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def test_resume_skips_a_damaged_checkpoint_and_says_so(run_train, tmp_path):
    run_train(*FLAGS, "--checkpoint-every", "4")
    newest = tmp_path / "runs/digits/checkpoints/step-00000006"
    (newest / "ema.safetensors").write_bytes(b"")
    code, error = run_train("--resume")
    assert code == 0
    assert "skipping the damaged checkpoint step-00000006" in error
    assert "continuing runs/digits at step 4" in error
    (newest / "ema.safetensors").write_bytes(b"")
    (newest.with_name("step-00000004") / "state.pt").unlink()
    code, error = run_train("--resume")
    assert code == 2
    assert "every checkpoint" in error.splitlines()[-1]


def test_a_moved_run_goes_on_where_it_is(run_train, tmp_path):
    assert run_train(*FLAGS)[0] == 0
    path = tmp_path / "runs/digits/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "out": "../elsewhere"}))
    code, error = run_train("--resume", "--steps", "7")
    assert code == 0, error
    assert json.loads(path.read_text())["steps"] == 7
    assert not (tmp_path.parent / "elsewhere").exists()


def test_model_folder_loads_in_diffusers_and_predicts_the_same(run_train, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    run_train(*FLAGS, "--schedule", "linear")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "runs/digits/model")
    run = load_run(tmp_path / "runs/digits")
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 17])
    with torch.no_grad():
        expected, actual = run.unet(x_t, t), pipeline.unet(x_t, t).sample
    # The same float32 operations in another order, a few dozen layers deep: 100 roundings of
    # 1.2e-7 on values of order 1.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    alpha_bars = run.diffusion.schedule.alpha_bars.float()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, alpha_bars, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--data", "digit"], ["--data digit", "digits, fashion-mnist, cifar10"]),
        (["--preset", "big"], ["--preset", "'big'", "ddpm_cifar10"]),
        (["--schedule", "sine"], ["--schedule", "'sine'", "linear", "cosine"]),
        (["--prediction", "noise"], ["--prediction noise: give one of eps, x0, v, mean"]),
        (["--variance", "huge"], ["--variance huge: give one of fixed_large, fixed_small"]),
        (["--loss", "mae"], ["--loss mae: give one of mse, rescaled_mse, kl, "]),
        (["--loss", "hybrid"], ["--loss", "variance='fixed_large' is fixed"]),
        (["--variance", "learned"], ["--variance learned", "choose --loss hybrid or kl"]),
        (["--weighting", "snrr"], ["--weighting snrr: give one of None, min_snr"]),
        (["--timestep-sampler", "x"], ["--timestep-sampler x: give one of uniform, loss_sec"]),
        (["--schedule", "jsd"], ["--schedule jsd", "choose --prediction v or x0"]),
        (["--data", ""], ['--data ""', "digits, fashion-mnist"]),
        (["--config"], ["--config: expected one argument"]),
        (["--stepz", "3"], ["--stepz", "did you mean --steps"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--amp", "fp8"], ["--amp", "'fp8'", "'off', 'bf16'"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--resume"], ["--resume", "holds no run"]),
        (["--data", "empty"], ["--data empty", "no images"]),
        (["--data", "two", "--class-cond"], ["--class-cond", "classes"]),
        (["--data", "mixed"], ["a.png is 8x8, b.png is 9x8", "--image-size"]),
        (["--data", "broken"], ["none of 1 images can be read: broken/a.png (not an image"]),
        (["--data", "labels.npz"], ["labels.npz: 3 images but 2 labels"]),
        (["--download"], ["--download fetches cifar10 and fashion-mnist only, not --data digits"]),
        (["--wandb", "w"], ["--wandb w needs the package wandb", "pip install wandb"]),
        (["--config", "absent.yaml"], ["--config absent.yaml", "No such file"]),
        (["--config", "bad.yaml"], ["--config bad.yaml", "unknown setting 'stepz'", "steps"]),
        (["--out", "file/run"], ["--out file/run", "cannot write in file"]),
        (
            ["--preset", "ddpm_cifar10"],
            [
                "--preset ddpm_cifar10 is made for 3 channels per image, --data digits has 1; ",
                "--channels rgb converts the images; --channels data changes the preset; ",
                "presets for 1: mnist, ",
            ],
        ),
        (["--channels", "green"], ["--channels", "'green'", "'data', 'preset', 'grey', 'rgb'"]),
        (["--data", "four.npz", "--channels", "grey"], ["--data four.npz have 4, not 1 or 3"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(run_train, tmp_path, monkeypatch, argv, fragments):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("empty", "two", "mixed", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mixed/a.png")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "mixed/b.png")
    (tmp_path / "broken/a.png").write_bytes(b"nothing")
    np.savez(tmp_path / "labels.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(2))
    np.savez(tmp_path / "four.npz", images=np.zeros((3, 8, 8, 4), np.uint8))
    (tmp_path / "bad.yaml").write_text("stepz: 3\n")
    (tmp_path / "file").write_text("")
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"two/{name}.png")
    before = contents(tmp_path)
    flags = [] if "--preset" in argv or "--resume" in argv else ["--preset", "tiny"]
    assert_one_line(run_train(*flags, *argv), *fragments)
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_a_preset_that_is_named_must_fit_the_images_unless_channels_says_otherwise(
    run_train, tmp_path
):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    (tmp_path / "run.yaml").write_text("preset: tiny\n")
    expected = ("--preset tiny is made for 1 channels per image, --data photos has 3", "grey")
    assert_one_line(run_train("--data", "photos", *FLAGS), *expected)
    assert_one_line(run_train("--data", "photos", "--config", "run.yaml"), *expected)
    assert not (tmp_path / "runs").exists()
    assert TrainConfig.for_data("photos").channels == "data"  # its own preset adapts

    code, error = run_train("--data", "photos", *FLAGS, "--steps", "1", "--channels", "grey")
    assert code == 0, error
    assert load_run(tmp_path / "runs/photos").image_shape == (1, 8, 8)


def test_training_goes_on_without_the_images_that_cannot_be_read(run_train, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-40])
    code, error = run_train(*FLAGS, "--data", "photos", "--steps", "1", "--batch-size", "4")
    assert code == 0, error
    assert "skipped 1 of 4 images that cannot be read: photos/1.png (" in error
    assert "3 images of 8x8x1" in error


def test_an_environment_of_no_process_is_one_line(run_train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    assert_one_line(run_train(*FLAGS), "RANK is 2 and WORLD_SIZE 2", "torchrun")
    assert not (tmp_path / "runs").exists()


def test_a_backend_that_is_not_there_is_one_line(run_train, tmp_path, monkeypatch):
    problem = _backends._problem("nope", "FASTDIFF_BACKEND")
    monkeypatch.setattr(_backends, "_environment", "nope")
    monkeypatch.setattr(_backends, "_environment_problem", problem)
    assert_one_line(run_train(*FLAGS), "FASTDIFF_BACKEND: unknown backend 'nope'", "reference")
    assert not (tmp_path / "runs").exists()


def test_a_terminal_without_unicode_gets_the_message_too():
    box = """\
 Unrecognized options
 ----------------------------------------------------------
  Unrecognized options: --stepz, 3
  ----------------------------------------------------------
  Perhaps you meant:
      --steps INT
          Optimizer steps of the whole run. (default: 900)
  ----------------------------------------------------------
  For full helptext, run a.py --help
"""
    assert _cli._unboxed(box) == "Unrecognized options: --stepz, 3 (did you mean --steps?)"


def test_help_into_a_closed_pipe_is_silent():
    command = [sys.executable, "-m", "fastdiff.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_help_names_every_choice(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for heading, names in (
        ("Noise schedule:", SCHEDULES),
        ("What the U-Net predicts:", PREDICTIONS),
        ("Variance of the reverse step:", VARIANCES),
        ("Training loss:", LOSSES),
        ("Weight of the error at each timestep:", WEIGHTINGS),
        ("How timesteps are drawn:", TIMESTEP_SAMPLERS),
    ):
        choices = text.split(heading)[1].split(".")[0]
        assert set(re.findall(r"\w+", choices)) >= set(names), heading


def test_flags_go_before_the_config_file_and_it_before_the_recipe(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("data: cifar10\nlr: 1e-5\nwarmup: 7\nema: [0.9, 0.5]\n")
    config = train.parse(["--config", str(path), "--warmup", "9"])
    assert (config.data, config.lr, config.warmup) == ("cifar10", 1e-5, 9)
    assert config.ema == (0.9, 0.5)
    assert train.parse(["--config", str(path), "--ema", "0.1", "0.2"]).ema == (0.1, 0.2)
    assert config.preset == "ddpm_cifar10"
    assert train.parse([f"--config={path}", "--data=digits"]).preset == "digits"


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(run_train, monkeypatch):
    original = _cli.importlib.util.find_spec
    missing = {"tyro", "yaml"}
    monkeypatch.setattr(
        _cli.importlib.util, "find_spec", lambda name: None if name in missing else original(name)
    )
    assert_one_line(run_train(), "missing tyro, yaml", 'pip install "fastdiff[train]"')


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, signum):
    command = [sys.executable, "-m", "fastdiff.train", "--batch-size", "2", "--log-every", "1"]
    command += ["--steps", "100000", "--out", "run", "--device", "cpu"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert "Traceback" not in error
    assert "python -m fastdiff.train --out run --resume" in error
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"stopped at step {last} of 100000" in error
