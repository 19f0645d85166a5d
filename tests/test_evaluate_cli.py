"""`python -m fastdiff.evaluate`, through its real front door."""

import dataclasses
import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from training.test_distributed import CPU, in_processes

from fastdiff import _cli, evaluate
from fastdiff.diffusion.likelihood import flow_likelihood
from fastdiff.evaluation import features
from fastdiff.evaluation.frechet import frechet_distance
from fastdiff.evaluation.yardsticks import frechet_verdict, yardsticks
from fastdiff.nn import PRESETS
from fastdiff.sample import generate
from fastdiff.samplers import DDIM
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset, load_run

CONFIG = TrainConfig(
    preset="tiny",
    steps=3,
    batch_size=8,
    timesteps=12,
    schedule="linear",
    num_samples=4,
    sample_steps=2,
    device="cpu",
    lr=1e-2,
    warmup=0,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and a class-conditional one with learned variance, hardly trained."""
    patch = pytest.MonkeyPatch()
    tiny = PRESETS["digits"].replace(channels=8, num_groups=4)
    patch.setitem(PRESETS, "tiny", tiny)
    folder = tmp_path_factory.mktemp("runs")
    learned = {"class_cond": True, "variance": "learned_range", "loss": "hybrid"}
    for name, changes in (("plain", {}), ("learned", learned)):
        run = RunFolder(folder / name)
        config = dataclasses.replace(CONFIG, **changes)
        run.create(config)
        Trainer(config, load_dataset("digits"), run, torch.device("cpu")).train()
    patch.undo()  # from here on a run must describe itself
    return folder


@pytest.fixture
def run_evaluate(monkeypatch, capfd, tmp_path, runs):
    """Call the command in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "learned"):
        (tmp_path / name).symlink_to(runs / name)

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff.evaluate", *argv, "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(evaluate.PROGRAM, evaluate.main, evaluate.NEEDS)
        return stopped.value.code, *capfd.readouterr()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def _indices(num, seed):
    return np.random.default_rng(seed).permutation(len(load_dataset("digits")))[:num]


def chosen(num, seed):
    """The images that --num and --seed stand for, and their classes."""
    dataset = load_dataset("digits")
    indices = _indices(num, seed)
    x0 = torch.from_numpy(dataset.images[indices]).permute(0, 3, 1, 2)
    return x0, torch.from_numpy(dataset.labels[indices])


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_bits_per_dim_in_table_file_and_plot(run_evaluate, runs, name):
    code, out, error = run_evaluate(name, "--bpd", "--num", "5", "--seed", "3", "--batch-size", "7")
    assert code == 0
    run = load_run(runs / name)
    x0, labels = chosen(5, 3)
    kwargs = {"y": labels} if name == "learned" else {}
    bits = run.diffusion.bits_per_dim(run.unet, x0, 3, model_kwargs=kwargs, progress=False)
    folder = runs / name / "evaluation"
    values = json.loads((folder / "bpd.json").read_text())
    # Another batch size may take other matrix kernels.
    assert values["bits_per_dim"] == pytest.approx(float(bits.total.mean()), rel=1e-4)
    standard_error = float(bits.total.std()) / math.sqrt(5)
    assert values["standard_error"] == pytest.approx(standard_error, rel=1e-3)
    assert values["vb"] == pytest.approx(bits.vb.mean(0).tolist(), rel=1e-3)
    assert values["decoder"] == values["vb"][0]
    assert values["prior"] + sum(values["vb"]) == pytest.approx(values["bits_per_dim"])
    assert values["terminal_snr"] == run.diffusion.schedule.terminal_snr
    assert values["timesteps_per_image"] == 12
    found = yardsticks(np.delete(load_dataset("digits").images, _indices(5, 3), 0), x0.numpy())
    assert values["levels_of_the_data"] == 17
    assert values["bits_per_dim_uniform"] == math.log2(17) > values["bits_per_dim_pixels"]
    assert values["bits_per_dim_pixels"] == pytest.approx(found.pixels, rel=1e-9)
    # Not of a trained network: worse than all, whose names and reason are the first line.
    assert values["verdict"].startswith("worse than uniform over the data's 17 levels and a hist")
    assert "the data use 17 of 256 levels" in out.splitlines()[0]
    assert values["rate"][-1] == pytest.approx(values["bits_per_dim"])
    assert len(values["rate"]) == len(values["distortion"]) == 13
    facts = {"metric": "bpd", "step": 3, "data": "digits", "num": 5, "seed": 3}
    assert values.items() >= {**facts, "training_images": True}.items()
    assert f"{values['bits_per_dim']:.4f} +- {values['standard_error']:.4f}" in out
    assert "which it was trained on" in error
    assert Image.open(folder / "rate_distortion.png").width > 300


def test_likelihood_and_reconstruction(run_evaluate, runs):
    argv = ["learned", "--likelihood", "--reconstruction", "--num", "3", "--batch-size", "4"]
    code, out, _ = run_evaluate(
        *argv, "--steps", "3", "6", "13", "--probes", "2", "--tolerance", "1e-2"
    )
    assert code == 0
    folder = runs / "learned" / "evaluation"
    run = load_run(runs / "learned")
    x0, labels = chosen(3, 0)

    values = json.loads((folder / "likelihood.json").read_text())
    flow = flow_likelihood(
        run.diffusion,
        run.unet,
        x0,
        0,
        probes=2,
        dequantize=True,
        rtol=1e-2,
        atol=1e-2,
        model_kwargs={"y": labels},
        progress=False,
    )
    assert values["bits_per_dim"] == pytest.approx(float(flow.bits_per_dim.mean()), rel=1e-3)
    of_the_probes = float(flow.standard_error.square().sum().sqrt()) / 3
    assert values["standard_error_of_the_probes"] == pytest.approx(of_the_probes, rel=1e-2)

    values = json.loads((folder / "reconstruction.json").read_text())
    assert values["steps"] == [3, 6]  # there are 12 timesteps
    pixels = x0.float() / 127.5 - 1
    for steps, mse in zip(values["steps"], values["mse"], strict=True):
        sampler = DDIM(run.diffusion, steps=steps, clip_denoised=False)
        kwargs = {"model_kwargs": {"y": labels}, "progress": False}
        x_T = sampler.encode(run.unet, pixels, **kwargs)
        again = sampler.sample(run.unet, x_T=x_T, **kwargs)
        assert mse == pytest.approx(float(((again - pixels) / 2).square().mean()), rel=1e-3)
        assert f"{steps} steps" in out
    assert not (folder / "frechet.json").exists()


def test_without_a_flag_every_metric_is_evaluated_anew(run_evaluate, runs, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images[..., None])
    argv = ["plain", "--num", "2", "--steps", "2", "--probes", "1", "--tolerance", "1e-2"]
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 3)
    argv += ["--samples", "20"]
    for data in ([], ["--data", "images.npz"]):
        code, _, error = run_evaluate(*argv, *data)
        assert code == 0
    assert "left out: --samples 20: --frechet needs twice as many real images" in error
    folder = runs / "plain" / "evaluation"
    assert json.loads((folder / "frechet.json").read_text())["data"] == "digits"
    for name in evaluate.METRICS.keys() - {"frechet"}:
        values = json.loads((folder / f"{name}.json").read_text())
        assert (values["data"], values["training_images"]) == ("images.npz", False)
    assert (
        json.loads((folder / "likelihood.json").read_text())["standard_error_of_the_probes"] is None
    )


def test_two_processes_find_what_one_finds(runs, tmp_path):
    config = evaluate.EvaluateConfig(
        run=str(runs / "learned"),
        bpd=True,
        likelihood=True,
        reconstruction=True,
        frechet=True,
        num=3,
        probes=1,
        steps=(3,),
        tolerance=1e-2,
        samples=20,
        batch_size=8,
        features="training.test_features:mean_and_spread",
        device="cpu",
    )

    def work(world):
        evaluate._evaluate(evaluate._prepare(config, CPU, world, print), print)

    found = []
    for size in (1, 2):
        results = in_processes(size, work)
        assert list(results.values()) == [None] * size
        folder = runs / "learned/evaluation"
        found.append({p.name: json.loads(p.read_text()) for p in folder.glob("*.json")})
        for path in folder.glob("*.json"):
            path.unlink()
    assert found[0].keys() == {f"{name}.json" for name in evaluate.METRICS}
    for name, one in found[0].items():
        for key, value in one.items():
            numbers = isinstance(value, (float, list))
            expected = pytest.approx(value, rel=1e-3) if numbers else value
            assert found[1][name][key] == expected, (name, key)


def test_every_metric_has_a_flag():
    flags = {f.name for f in dataclasses.fields(evaluate.EvaluateConfig) if f.type == "bool"}
    assert flags - {"test_images", "cuda_graph", "inference_form"} == set(evaluate.METRICS)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["nowhere"], ["RUN: nowhere holds no run"]),
        ([], ["Missing", "Run folder"]),
        (["plain", "--bdp"], ["--bdp", "did you mean --bpd"]),
        (["plain", "--num", "0"], ["--num 0"]),
        (["plain", "--num", "5000"], ["--num 5000: there are 1797 images"]),
        (
            ["plain", "--frechet", "--samples", "500", "--data", "eleven.npz"],
            ["--samples 500", "at most 5"],
        ),
        (
            ["plain", "--frechet", "--data", "eleven.npz"],
            ["eleven.npz has no classes", "--features"],
        ),
        (["plain", "--frechet", "--data", "one.npz"], ["--frechet needs at least 4", "has 1"]),
        (["plain", "--bpd", "--data", "x" * 300], ["no such dataset"]),
        (["plain", "--batch-size", "1"], ["--batch-size 1", "at least 2"]),
        (["plain", "--probes", "0"], ["--probes 0"]),
        (["plain", "--tolerance", "0"], ["--tolerance 0.0"]),
        (["plain", "--steps", "0"], ["--steps 0"]),
        (["plain", "--steps", "13"], ["--steps 13: ", "1..12"]),
        (["plain", "--data", "digit"], ["--data digit", "digits, fashion-mnist"]),
        (["plain", "--data", "large.npz"], ["--data large.npz: images of 9x9x1", "8x8x1"]),
        (["learned", "--data", "small.npz"], ["--data small.npz", "class-conditional"]),
        (["learned", "--data", "many.npz"], ["--data many.npz: 80 classes", "trained with 10"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(run_evaluate, runs, tmp_path, argv, fragments):
    np.savez(tmp_path / "eleven.npz", np.zeros((11, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "large.npz", np.zeros((80, 9, 9, 1), np.uint8))
    np.savez(tmp_path / "small.npz", np.zeros((80, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "many.npz", np.zeros((80, 8, 8, 1), np.uint8), np.arange(80))
    if "--steps" not in argv:
        argv = [*argv, "--steps", "4"]
    code, out, error = run_evaluate(*argv)
    assert (code, out) == (2, "")
    assert error.startswith("python -m fastdiff.evaluate: error: ")
    assert error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error


FRECHET = ["--frechet", "--samples", "40", "--sample-steps", "3"]


def mean_and_spread(levels):
    """Features that can be computed by hand; a user's module."""
    pixels = levels.double().flatten(1) / 255
    return torch.stack((pixels.mean(1), pixels.std(1)), 1).numpy()


@pytest.fixture
def own_features(monkeypatch):
    module = types.ModuleType("own")
    module.function = mean_and_spread
    module.broken = lambda levels: levels.float()
    module.nan = lambda levels: torch.full((len(levels), 2), torch.nan)
    module.number = 3
    monkeypatch.setitem(sys.modules, "own", module)


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_distance_and_floor_are_those_of_the_images(run_evaluate, runs, own_features, name):
    flags = ["--features", "own:function", "--seed", "5", "--eta", "0.5"]
    code, out, _ = run_evaluate(name, *FRECHET, *flags)
    assert code == 0
    values = json.loads((runs / name / "evaluation/frechet.json").read_text())

    dataset = load_dataset("digits")
    order = np.random.default_rng((5, 40)).permutation(len(dataset))
    real = torch.from_numpy(dataset.images).permute(0, 3, 1, 2)
    reference = mean_and_spread(real[order[40:]])
    floor = frechet_distance(mean_and_spread(real[order[:40]]), reference)
    run = load_run(runs / name)
    labels = torch.from_numpy(dataset.labels[order[:40]]) if name == "learned" else None
    levels = generate(run, DDIM(run.diffusion, 3, eta=0.5), 40, 5, labels)
    distance = frechet_distance(mean_and_spread(levels), reference)
    assert values["real_vs_real"] == pytest.approx(floor, rel=1e-6)
    assert values["frechet_distance"] == pytest.approx(distance, rel=1e-4)
    assert values["num"] == 40
    assert values["num_reference"] == len(dataset) - 40
    assert f"{distance:.3g}" in out.replace(f"{distance:.4g}", f"{distance:.3g}")
    for text in ("Frechet distance, 40 samples", f"{floor:.4g}", "rounded to uint8", "x the floor"):
        assert text in out
    grid = Image.open(runs / name / "evaluation/frechet.png")
    assert grid.size == (7 * 34 + 2, 6 * 34 + 2)  # all 40
    report = (runs / name / "report.html").read_text()
    assert f"{values['frechet_distance']:.4g}" in report


def test_the_classifier_is_trained_once_and_can_be_shared(run_evaluate, runs, monkeypatch):
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 60)
    code, out, error = run_evaluate("plain", *FRECHET)
    assert code == 0
    assert "training the classifier" in error
    path = runs / "plain/evaluation/features.safetensors"
    first = json.loads((runs / "plain/evaluation/frechet.json").read_text())
    assert first["feature_dimensions"] == 32
    assert first["features_accuracy"] > 0.5  # of ten classes
    assert f"right about {first['features_accuracy']:.0%}" in out
    written = path.stat().st_mtime_ns
    _, _, error = run_evaluate("plain", *FRECHET)
    assert "training" not in error
    assert path.stat().st_mtime_ns == written
    again = json.loads((runs / "plain/evaluation/frechet.json").read_text())
    assert again == first
    # The noise of an untrained model lies far above the floor.
    assert first["ratio"] > 3

    code, _, error = run_evaluate("learned", *FRECHET, "--features", str(path))
    assert code == 0
    assert "training" not in error
    # One that was trained on other images is replaced.
    images = load_dataset("digits")
    np.savez("halves.npz", images=images.images[:400], labels=images.labels[:400] % 2)
    code, _, error = run_evaluate("plain", *FRECHET, "--data", "halves.npz")
    assert "training the classifier for features on halves.npz" in error


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--samples", "1"], ["--samples 1", "at least 2"]),
        (["--samples", "899"], ["--samples 899", "1797", "at most 898"]),
        (["--sample-steps", "0"], ["--sample-steps 0", "at least 1"]),
        (["--sample-steps", "13"], ["--sample-steps", "13"]),
        (["--sampler", "ddum"], ["--sampler 'ddum'", "ddim, "]),
        (["--features", "clasifier"], ["--features clasifier", "module:function"]),
        (["--features", "own:missing"], ["--features own:missing: cannot import", "missing"]),
        (["--features", "nowhere_at_all:f"], ["cannot import", "nowhere_at_all"]),
        (["--features", "own:number"], ["--features own:number: is not a function"]),
        (["--features", "pipe.safetensors"], ["pipe.safetensors is a folder, a pipe or a dev"]),
        (["--features", "own:broken"], ["own:broken: gave (", "expected (", ", D)"]),
        (["--features", "own:nan"], ["own:nan: gave features that are not finite for 500 of 500"]),
        (["--data", "plain.npz"], ["plain.npz has no classes", "module:function"]),
        (["--test-images"], ["--data digits has no test images"]),
    ],
)
def test_bad_input_of_frechet_is_one_line(run_evaluate, own_features, argv, fragments):
    np.savez("plain.npz", load_dataset("digits").images)
    os.mkfifo("pipe.safetensors")
    code, _, error = run_evaluate("plain", *FRECHET, *argv)
    assert code == 2
    last = error.splitlines()[-1]
    assert last.startswith("python -m fastdiff.evaluate: error: ")
    for fragment in fragments:
        assert fragment in last


def test_yardsticks_of_data_that_are_what_they_assume():
    """Independent pixels of two levels; correlated Gaussian ones: entropies in closed form."""
    rng = np.random.default_rng(0)
    coins = np.where(rng.random((4000, 3, 2, 1)) < 0.2, 40, 200).astype(np.uint8)
    found = yardsticks(coins[:3000], coins[3000:])
    assert (found.levels, found.uniform) == (2, 1.0)
    entropy = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8))
    assert found.pixels == pytest.approx(entropy, abs=0.03)
    root = rng.normal(size=(6, 6)) * 12
    levels = np.clip(rng.normal(size=(9000, 6)) @ root.T + 128, 0, 255).round().astype(np.uint8)
    inside = levels[((levels > 0) & (levels < 255)).all(1)].reshape(-1, 3, 2, 1)
    found = yardsticks(inside[:-500], inside[-500:])
    covariance = np.cov(inside.reshape(len(inside), -1), rowvar=False)
    expected = 0.5 * math.log2(2 * math.pi * math.e) + 0.5 * np.linalg.slogdet(covariance)[1] / (
        6 * math.log(2)
    )
    assert found.gaussian == pytest.approx(expected, abs=0.05)
    assert found.gaussian < found.pixels < found.uniform
    assert found.verdict(found.gaussian - 1, 0.01) == "better than every trivial model"
    assert found.verdict(found.pixels, 0.01).startswith("worse than a Gaussian of the data's cov")
    assert found.verdict(found.gaussian, 0.01).startswith("better than trivial models, or as good")
    large = np.zeros((2, 65, 64, 1), np.uint8)
    assert yardsticks(large, large).gaussian is None


def test_a_frechet_distance_in_words():
    words = [frechet_verdict(ratio) for ratio in (1.0, 2.0, 5.0, 50.0)]
    assert len(set(words)) == 4
    assert "far from the data" in words[-1]
    assert "do not tell images apart" in frechet_verdict(None)
