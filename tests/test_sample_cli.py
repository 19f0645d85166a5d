"""`python -m fastdiff.sample`, through its real front door."""

import dataclasses
import inspect
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from fastdiff import _cli, ops, sample
from fastdiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, DynamicThresholding
from fastdiff.evaluation import guiding_classifier
from fastdiff.images import image_grid, to_uint8
from fastdiff.nn import PRESETS
from fastdiff.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    AnnealedLangevin,
    DPMSolverPP,
    Inpainting,
    PredictorCorrector,
    ReverseSDE,
)
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset, load_run

CONFIG = TrainConfig(
    preset="tiny",
    steps=3,
    batch_size=8,
    timesteps=20,
    num_samples=4,
    sample_steps=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unconditional and a class-conditional run, hardly trained."""
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "tiny", TINY)
    folder = tmp_path_factory.mktemp("runs")
    for name, class_cond in (("plain", False), ("classes", True)):
        run = RunFolder(folder / name)
        config = dataclasses.replace(
            CONFIG, class_cond=class_cond, lr=1e-2, warmup=0, ema=(0.5, 0.0)
        )
        run.create(config)
        Trainer(config, load_dataset("digits"), run, torch.device("cpu")).train()
    patch.undo()  # from here on a run must describe itself
    return folder


@pytest.fixture
def run_sample(monkeypatch, capfd, tmp_path, runs):
    """Call the command in this process; gives (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").symlink_to(runs / "plain")
    (tmp_path / "classes").symlink_to(runs / "classes")

    def call(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff.sample", *argv, "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(sample.PROGRAM, sample.main, sample.NEEDS)
        return stopped.value.code, capfd.readouterr().err

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("flags", "make"),
    [
        (["--steps", "5"], lambda d: DDIM(d, steps=5)),
        (
            ["--steps", "5", "--eta", "0.5", "--spacing", "trailing"],
            lambda d: DDIM(d, steps=5, eta=0.5, spacing="trailing"),
        ),
        (["--spacing", "3,2"], lambda d: DDIM(d, spacing="3,2")),
        (["--steps", "5", "--sigma-hat"], lambda d: DDIM(d, steps=5, sigma_hat=True)),
        (
            ["--sampler", "annealed_langevin", "--steps", "20", "--step-size", "1.5"],
            lambda d: AnnealedLangevin(d, steps=20, step_size=1.5),
        ),
        (
            ["--sampler", "reverse_sde", "--steps", "9", "--sde-method", "reverse_diffusion"],
            lambda d: ReverseSDE(d, steps=9, method="reverse_diffusion"),
        ),
        (["--sampler", "ddpm", "--steps", "20"], lambda d: DDPM(d, steps=20)),
        (["--sampler", "dpm_solver_pp", "--steps", "5"], lambda d: DPMSolverPP(d, steps=5)),
        (
            ["--sampler", "predictor_corrector", "--steps", "20", "--inner-steps", "2"],
            lambda d: PredictorCorrector(d, steps=20, corrector_steps=2),
        ),
    ],
)
def test_npz_holds_what_the_sampler_draws_whatever_the_batch_size(run_sample, runs, flags, make):
    run = load_run(runs / "plain")
    drawn = make(run.diffusion).sample(run.unet, (7, 1, 8, 8), seed=11, progress=False)
    expected = to_uint8(drawn).permute(0, 2, 3, 1).numpy()
    assert len(np.unique(expected)) > 10
    for batch_size in ("3", "7"):
        out = f"{batch_size}.npz"
        argv = ["plain", *flags, "--num", "7", "--seed", "11", "--batch-size", batch_size]
        assert run_sample(*argv, "--out", out)[0] == 0
        images = np.load(out)["arr_0"]
        assert images.dtype == np.uint8
        # Another batch size may take other matrix kernels: last bits, at most one level.
        difference = np.abs(images.astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_png_is_the_grid_of_the_same_images(run_sample, tmp_path):
    argv = ("plain", "--num", "10", "--steps", "4")
    assert run_sample(*argv, "--out", "new/grid.png")[0] == 0
    run_sample(*argv, "--out", "images.npz")
    images = torch.from_numpy(np.load("images.npz")["arr_0"]).permute(0, 3, 1, 2)
    grid = np.asarray(image_grid(images))
    assert np.array_equal(np.asarray(Image.open("new/grid.png")), grid)


def test_the_default_file_is_in_the_run_folder_and_names_its_settings(run_sample, runs):
    code, error = run_sample("plain", "--num", "2", "--steps", "4", "--seed", "5")
    assert code == 0
    path = runs / "plain/samples/ddim-4-seed-5-num-2.png"
    assert path.name in error
    assert path.exists()


def test_default_files_of_different_requests_have_different_names(run_sample, runs):
    requests = [
        [],
        ["--eta", "0.5"],
        ["--spacing", "trailing"],
        ["--num", "3"],
        ["--class-label", "1"],
        ["--sampler", "ddpm"],
        ["--seed", "1"],
        ["--steps", "5"],
    ]
    before = set((runs / "classes/samples").iterdir())
    for request in requests:
        argv = ["classes", "--num", "2"] if "--num" not in request else ["classes"]
        argv += ["--steps", "4"] if "--steps" not in request else []
        assert run_sample(*argv, *request)[0] == 0
    new = {path.name for path in set((runs / "classes/samples").iterdir()) - before}
    assert len(new) == len(requests)
    assert "ddim-4-seed-0-eta-0.5-num-2.png" in new
    assert "ddim-4-seed-0-class-1-num-2.png" in new
    # What changes neither the images nor how many there are does not make another file.
    code, error = run_sample("classes", "--num", "2", "--steps", "4", "--batch-size", "1")
    assert code == 2
    assert "exists; add --force" in error


def test_classes_in_turn_or_one_for_all(run_sample, runs):
    assert run_sample("classes", "--num", "12", "--steps", "4", "--out", "turn.npz")[0] == 0
    turn = np.load("turn.npz")
    assert turn["arr_1"].tolist() == [*range(10), 0, 1]
    argv = ("classes", "--num", "12", "--steps", "4", "--class-label", "1")
    assert run_sample(*argv, "--out", "one.npz")[0] == 0
    one = np.load("one.npz")
    assert one["arr_1"].tolist() == [1] * 12
    # Image 1 has the same noise and class in both; image 2 another class.
    difference = np.abs(turn["arr_0"].astype(int) - one["arr_0"]).reshape(12, -1).max(1)
    assert difference[1] <= 1
    assert difference[2] > 1


def test_guidance_is_that_of_the_samplers(run_sample, runs):
    flags = ["--guidance-scale", "3", "--guidance-rescale", "0.7", "--dynamic-threshold", "0.9"]
    argv = ["classes", "--steps", "4", "--num", "6", "--batch-size", "4", *flags]
    assert run_sample(*argv, "--out", "guided.npz")[0] == 0
    run = load_run(runs / "classes")
    guidance = ClassifierFree(3.0, {"y": torch.full((6,), 10)}, rescale=0.7)
    drawn = DDIM(run.diffusion, 4).sample(
        run.unet,
        (6, 1, 8, 8),
        guidance=DynamicThresholding(run.diffusion, 0.9, guidance),
        model_kwargs={"y": torch.arange(6)},
        progress=False,
    )
    expected = to_uint8(drawn).permute(0, 2, 3, 1).numpy()
    difference = np.abs(np.load("guided.npz")["arr_0"].astype(int) - expected)
    assert difference.max() <= 1
    assert run_sample(*argv[:-6], "--out", "plain.npz")[0] == 0
    assert np.abs(np.load("plain.npz")["arr_0"].astype(int) - expected).max() > 1


@pytest.mark.parametrize("resamples", [1, 3])
def test_inpainting_keeps_what_is_not_masked(run_sample, runs, tmp_path, resamples):
    """Image 5 of the digits, and the same from a file with a mask from a file."""
    digit = load_dataset("digits").images[5]
    Image.fromarray(digit[..., 0]).save("digit.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save("mask.png")
    argv = ["plain", "--sampler", "ddpm", "--steps", "20", "--num", "5", "--batch-size", "2"]
    argv += ["--resamples", str(resamples)]
    drawn = []
    for image, part in (("5", "left"), ("digit.png", "mask.png")):
        out = f"{part}.npz"
        code, error = run_sample(*argv, "--image", image, "--mask", part, "--out", out)
        assert code == 0, error
        with np.load(out) as file:
            drawn.append(file["arr_0"])
    assert np.array_equal(*drawn)
    assert np.array_equal(drawn[0][:, :, 4:], np.broadcast_to(digit[:, 4:], (5, 8, 4, 1)))
    run = load_run(runs / "plain")
    known = torch.from_numpy(digit).permute(2, 0, 1)[None].float() / 127.5 - 1
    sampler = Inpainting(
        DDPM(run.diffusion, 20),
        known,
        torch.from_numpy(mask == 0),
        jump_length=2,
        resamples=resamples,
    )
    expected = to_uint8(sampler.sample(run.unet, (5, 1, 8, 8), progress=False))
    difference = np.abs(drawn[0].astype(int) - expected.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 1
    # A name for a path; a .gif has a frame for every step that is taken.
    assert run_sample(*argv, "--image", "5", "--mask", "left", "--out", "a.gif")[0] == 0
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 20 * resamples


@pytest.mark.parametrize("name", ["plain", "classes"])
def test_classifier_guidance_trains_its_classifier_once(run_sample, runs, monkeypatch, name):
    monkeypatch.setattr(guiding_classifier, "STEPS", 5)
    (runs / name / "classifier.safetensors").unlink(missing_ok=True)
    argv = [name, "--steps", "4", "--num", "6", "--batch-size", "4", "--class-label", "3"]
    argv += ["--classifier-scale", "30"]
    code, error = run_sample(*argv, "--out", "guided.npz")
    assert code == 0, error
    assert "training a classifier of noisy images (once, 5 steps" in error
    run = load_run(runs / name)
    folder = runs / name
    classifier = guiding_classifier.guiding_classifier(
        run, folder, lambda: pytest.fail("trained again"), torch.device("cpu"), print
    )
    y = torch.full((6,), 3)
    drawn = DDIM(run.diffusion, 4).sample(
        run.unet,
        (6, 1, 8, 8),
        guidance=ClassifierGuidance(classifier, y, 30.0, run.diffusion),
        model_kwargs={"y": y} if name == "classes" else {},
        progress=False,
    )
    expected = to_uint8(drawn).permute(0, 2, 3, 1).numpy()
    with np.load("guided.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - expected).max() <= 1
    code, error = run_sample(*argv, "--out", "again.npz")
    assert code == 0
    assert "training" not in error
    (folder / "classifier.safetensors").write_bytes(b"damaged")
    code, error = run_sample(*argv, "--out", "third.npz")
    assert code == 2
    assert "holds no classifier for this run" in error
    (folder / "classifier.safetensors").unlink()


def test_grids_have_a_row_per_class(run_sample, tmp_path):
    argv = ("classes", "--num", "23", "--steps", "4")
    assert run_sample(*argv, "--out", "rows.png")[0] == 0
    run_sample(*argv, "--out", "rows.npz")
    with np.load("rows.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    picture = np.asarray(Image.open("rows.png"))
    assert picture.shape == (10 * 34 + 2, 3 * 34 + 2)
    for k in (0, 3, 13, 22):
        tile = images[k, :, :, 0].repeat(4, 0).repeat(4, 1)
        top, left = 2 + 34 * labels[k], 2 + 34 * (k // 10)
        assert np.array_equal(picture[top : top + 32, left : left + 32], tile)
    assert (picture[2 + 34 * 9 :, 70:] == 255).all()  # class 9 has two images


def test_a_gif_shows_every_step_and_ends_with_the_images(run_sample):
    argv = ("plain", "--num", "5", "--steps", "6", "--batch-size", "2")
    assert run_sample(*argv, "--out", "steps.gif")[0] == 0
    assert run_sample(*argv, "--out", "images.png")[0] == 0
    with Image.open("steps.gif") as gif:
        assert gif.n_frames == 6
        gif.seek(5)
        last = np.asarray(gif.convert("L")).astype(int)
    # DDIM's last step returns its prediction.
    assert np.abs(last - np.asarray(Image.open("images.png"))).max() <= 1


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["nowhere"], ["RUN: nowhere holds no run"]),
        ([], ["Missing", "Run folder"]),
        (["plain", "--stepz", "4"], ["--stepz", "did you mean --steps"]),
        (["plain", "--sampler", "euler"], ["--sampler", "'euler'", "ddim, ddpm, probability_flow"]),
        (["plain", "--out", "taken.png"], ["--out taken.png exists", "--force"]),
        (["plain", "--out", "a.txt"], ["--out a.txt", ".npz"]),
        (["plain", "--num", "0"], ["--num 0"]),
        (["plain", "--batch-size", "0"], ["--batch-size 0"]),
        (["plain", "--steps", "21"], ["--steps", "21", "1..20"]),
        (["plain", "--spacing", "even"], ["--spacing", "'even'", "leading", "trailing"]),
        (["plain", "--eta", "2", "--steps", "5"], ["--eta", "0 (deterministic) to 1"]),
        (["plain", "--sampler", "ddpm", "--eta", "1"], ["--eta 1.0 belongs to --sampler ddim"]),
        (["plain", "--sampler", "heun", "--eta", "1"], ["belongs to --sampler ddim", "for heun"]),
        (["plain", "--inner-steps", "2"], ["--inner-steps 2", "annealed_langevin", "for ddim"]),
        (["plain", "--class-label", "3"], ["--class-label", "without --class-cond"]),
        (["plain", "--guidance-scale", "3"], ["--guidance-scale", "without --class-cond"]),
        (["classes", "--guidance-rescale", "0.7"], ["0.7 needs --guidance-scale"]),
        (["plain", "--dynamic-threshold", "2"], ["--dynamic-threshold", "in (0, 1]"]),
        (["classes", "--class-label", "10"], ["--class-label 10", "0..9"]),
        (["plain", "--sampler", "ddpm", "--sigma-hat"], ["--sigma-hat belongs to --sampler ddim"]),
        (["plain", "--step-size", "1"], ["--step-size 1.0 belongs to --sampler annealed_langevin"]),
        (["plain", "--sde-method", "x"], ["--sde-method x belongs to --sampler reverse_sde"]),
        (
            ["plain", "--sampler", "reverse_sde", "--sde-method", "milstein"],
            ["--sde-method", "unknown method 'milstein'"],
        ),
        (["plain", "--image", "0"], ["--image and --mask go together"]),
        (["plain", "--image", "9999", "--mask", "top"], ["--image 9999", "images 0..1796"]),
        (["plain", "--image", "x.png", "--mask", "top"], ["--image x.png: no such file"]),
        (["plain", "--image", "taken.png", "--mask", "top"], ["--image taken.png"]),
        (["plain", "--image", "0", "--mask", "middle"], ["--mask middle", "left, right, top"]),
        (["plain", "--resamples", "2"], ["--resamples 2 needs --image"]),
        (
            ["classes", "--classifier-scale", "1", "--guidance-scale", "2"],
            ["--classifier-scale and --guidance-scale"],
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(run_sample, tmp_path, argv, fragments):
    (tmp_path / "taken.png").write_text("precious")
    if "--steps" not in argv:
        argv = [*argv, "--steps", "4"]
    code, error = run_sample(*argv)
    assert code == 2
    assert error.startswith("python -m fastdiff.sample: error: ")
    assert error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error
    assert (tmp_path / "taken.png").read_text() == "precious"


def test_what_does_not_fit_into_the_memory_is_one_line(run_sample):
    code, error = run_sample("plain", "--steps", "4", "--num", str(1 << 50))
    assert code == 1
    assert "error: out of memory (" in error
    assert "9007199254740992 bytes" in error  # of the keys alone
    assert error.count("\n") == 1


def test_force_overwrites(run_sample, tmp_path):
    (tmp_path / "taken.png").write_text("worthless")
    argv = ("plain", "--num", "2", "--steps", "4", "--out", "taken.png", "--force")
    assert run_sample(*argv)[0] == 0
    assert Image.open("taken.png").format == "PNG"


def test_noise_of_an_image_does_not_depend_on_how_many_are_drawn(runs):
    run = load_run(runs / "plain")
    sampler = DDIM(run.diffusion, steps=4)
    few, many = (sample.generate(run, sampler, num, seed=2).int() for num in (3, 9))
    assert (few - many[:3]).abs().max() <= 1
    assert not torch.equal(many[0], many[1])
    assert len(set(ops.sample_keys(2, 9).tolist())) == 9


def test_images_come_from_the_average_asked_for(run_sample, runs, tmp_path):
    expected = {}
    for flags, ema in (([], 0.5), (["--ema", "0.0"], 0.0)):
        code, error = run_sample(
            "plain", "--num", "2", "--steps", "4", "--out", f"{ema}.npz", *flags
        )
        assert code == 0
        assert f"2 images of step 3 of plain (--ema {ema}): {ema}.npz" in error
        run = load_run(runs / "plain", ema=ema)
        images = DDIM(run.diffusion, steps=4).sample(run.unet, (2, 1, 8, 8), progress=False)
        expected[ema] = to_uint8(images).permute(0, 2, 3, 1).numpy()
        with np.load(tmp_path / f"{ema}.npz") as drawn:
            assert np.array_equal(drawn["arr_0"], expected[ema])
    assert not np.array_equal(expected[0.5], expected[0.0])
    code, error = run_sample("plain", "--ema", "0.9", "--out", "x.npz")
    assert code == 2
    assert "--ema 0.9: plain has averages of decay 0.5 or 0.0" in error


def test_help_names_every_sampler():
    """tyro reads it in the source."""
    source = inspect.getsource(sample.SampleConfig)
    text = source[source.index("sampler: str") : source.index("steps: int")]
    named = re.findall(r"[a-z_]{4,}", text.partition('"""')[2].partition("How to sample:")[2])
    assert [name for name in named if name in SAMPLERS] == list(SAMPLERS)


def test_the_precision_is_that_of_training_unless_another_is_asked_for(run_sample, runs, tmp_path):
    """A run trained with --amp bf16 --channels-last: a copy whose settings say so."""
    run = RunFolder(tmp_path / "half")
    shutil.copytree(runs / "plain", run.path)
    settings = json.loads(run.config.read_text()) | {"amp": "bf16", "channels_last": True}
    del settings["checksum"]  # changed by hand
    run.config.write_text(json.dumps(settings))
    drawn = {}
    for name, flags in {
        "as trained": (),
        "bf16": ("--amp", "bf16", "--channels-last", "True"),
        "off": ("--amp", "off", "--channels-last", "False"),
    }.items():
        out = tmp_path / f"{name}.npz"
        code, error = run_sample("half", "--num", "4", "--steps", "4", "--out", str(out), *flags)
        assert code == 0, error
        with np.load(out) as file:
            drawn[name] = file["arr_0"]
    loaded = load_run(run.path)
    sampler = DDIM(loaded.diffusion, steps=4)
    for name, amp in (("bf16", "bf16"), ("off", "off")):
        levels = sample.generate(loaded.computed(amp), sampler, 4).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(drawn[name], levels)
    assert np.array_equal(drawn["as trained"], drawn["bf16"])
    assert not np.array_equal(drawn["as trained"], drawn["off"])


def test_a_cuda_graph_needs_a_gpu(run_sample):
    code, error = run_sample("plain", "--cuda-graph")
    assert code == 2
    assert "--cuda-graph: needs a GPU, not --device cpu" in error
