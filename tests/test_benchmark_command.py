"""`python -m benchmarks`: choice of cases, the gate, targets, comparison, pages."""

from __future__ import annotations

import copy
import json
import pathlib
import platform
import subprocess
import sys
import types

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the root and not installed

from benchmarks import (  # noqa: E402
    bench_eps_loss,
    bench_q_sample,
    command,
    compare,
    machine,
    page,
    plots,
    report,
    targets,
)
from benchmarks.shapes import NETWORKS  # noqa: E402
from benchmarks.targets import Target, judge  # noqa: E402

TINY = ["--shapes", "digits b64", "--layouts", "nchw", "--compile", "none", "--device", "cpu"]
FAST = [*TINY, "--dtypes", "fp32", "--quick", "--rounds", "1"]


def contender(seconds: float, spread: float = 0.02, moved: int = 100) -> dict:
    return {"median_s": seconds, "min_s": seconds, "spread": spread, "bytes": moved}


def row(op="q_sample", shape="ddpm_256 b128", mode="given", **times) -> dict:
    found = {name: contender(seconds) for name, seconds in times.items()}
    labels = {"op": op, "shape": shape, "dtype": "fp32", "layout": "nchw", "mode": mode}
    return {**labels, "bytes": 100, "contenders": found, "wrong": {}, "peers_wrong": []}


MACHINE = {
    "cpu": "CPU", "simd": "AVX2", "cores": 2, "threads": 2, "load": 0.1, "torch": "2",
    "compiler": "c++", "copy_gb_s": 10.0,
}  # fmt: skip


def document(*rows: dict, **more) -> dict:
    return {"format": 1, "machine": MACHINE, "arguments": [], "ops": rows, "overhead": [], **more}


def test_every_shape_names_its_network_and_every_default_exists():
    for op in command.OPS.values():
        assert {shape.split(" ")[0] for shape in op.shapes} <= set(NETWORKS)
        assert set(op.default_shapes) | set(op.quick_shapes) <= set(op.shapes)
        assert set(op.tiny_modes) <= set(op.modes)


def test_quick_is_a_part_and_compiles_few():
    def chosen(*arguments):
        options = command.parse([*arguments, "--device", "cpu"])
        return [case for op in command.OPS.values() for case in command.cases(op, options)]

    quick, default, every = chosen("--quick"), chosen(), chosen("--all")
    assert len(quick) < len(default) < len(every)
    assert 0 < sum(case.compiled for case in quick) <= len(command.OPS)
    assert not any(case.compiled for case in chosen("--compile", "none"))
    assert all(case.compiled for case in chosen("--quick", "--compile", "all"))


def test_a_wrong_kernel_suppresses_its_numbers_and_fails_the_run(monkeypatch, capsys, tmp_path):
    right = bench_q_sample.ops.q_sample
    broken = types.SimpleNamespace(q_sample=lambda *args, **kw: right(*args, **kw) * 1.001)
    monkeypatch.setattr(bench_q_sample, "ops", broken)
    path = tmp_path / "out.json"
    assert command.main(["q_sample", *FAST, "--modes", "given", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "q_sample digits b64 fp32 nchw given, fastdiff: error" in printed
    line = next(line for line in printed.splitlines() if line.startswith("digits b64"))
    assert line.removeprefix("digits b64").split()[3:6] == ["-", "-", "-"], "us, IQR, GB/s"
    assert not any(cell.endswith("x") for cell in line.split()), "no ratio"
    assert "fastdiff" not in json.loads(path.read_text())["ops"][0]["contenders"]


@pytest.mark.parametrize("op", ["eps_loss", "posterior_mean", "vlb_terms", "group_norm_silu"])
def test_every_gate_finds_a_wrong_result_and_nan(op):
    chosen = command.OPS[op]
    for case in chosen.tiny_cases(torch.device("cpu")):
        for name, made in chosen.workload(case).contenders.items():
            result = made.run()
            assert made.error(result) is None, (case.labels, name)
            for factor in (1.01, float("nan")):
                wrong = (
                    tuple(factor * r for r in result)
                    if isinstance(result, tuple)
                    else factor * result
                )
                assert made.error(wrong) is not None, (case.labels, name)


def test_a_generator_that_is_off_is_found(monkeypatch):
    right = bench_eps_loss.ops.philox_normal
    wrong = types.SimpleNamespace(philox_normal=lambda *args: right(*args) + 1e-3)
    monkeypatch.setattr(bench_eps_loss, "ops", wrong)
    with pytest.raises(RuntimeError, match="philox_normal is off"):
        bench_eps_loss.seeded_noise((4, 3, 8, 8))


def test_command_writes_what_it_measured(tmp_path):
    path, out = tmp_path / "out.json", tmp_path / "out"
    arguments = ["q_sample", *FAST, "--threads", "1"]
    files = ["--json", str(path), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, *files],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "targets" in done.stdout
    text = path.read_text()
    for private in (str(ROOT), str(tmp_path), str(pathlib.Path.home()), platform.node()):
        assert private not in text
    found = json.loads(text)
    assert found["machine"]["threads"] == 1
    assert found["machine"]["copy_gb_s"] > 0.1
    assert found["arguments"] == arguments
    if platform.libc_ver()[0] == "glibc":
        assert found["machine"]["steady_allocator"], "the command did not start itself again"
    elements = 64 * 8 * 8
    assert [r["bytes"] for r in found["ops"]] == [12 * elements, 8 * elements, 5 * elements]
    for measured in found["ops"]:
        assert {"fastdiff", "eager", "copy_", "clone"} <= set(measured["contenders"])
        for timing in measured["contenders"].values():
            assert 0 < timing["min_s"] <= timing["median_s"] < 1
    assert [r["mode"] for r in found["overhead"]] == ["given", "seed", "uint8"]
    (written,) = out.glob("*.json")
    assert json.loads(written.read_text())["ops"] == found["ops"]
    text = written.with_suffix(".md").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert [name.rpartition("-")[2] for name in pictures] == ["roofline.png", "speed_ups.png"]
    assert all(f"({name})" in text for name in pictures)
    assert "| digits b64 | given |" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["q_smaple"], "unknown op 'q_smaple'; the ops are q_sample, eps_loss"),
        (["--shapes", "huge"], "no case has these --shapes and --modes; the shapes are ddim_cel"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--threads", "-1"], "--threads is -1, expected at least 1"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--compare", "no_such.json"], "--compare: there is no file no_such.json"),
        (["--quick", "--all"], "not allowed with argument"),
    ],
)
def test_bad_options(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


MEAN = Target(
    "k", "text", targets.over("eager"), targets.rows_of("q_sample"), least=3.0, lowest=1.0
)


@pytest.mark.parametrize(
    ("gains", "met", "missing"),
    [([4.0, 4.0], True, 0), ([9.0, 1.0], True, 0), ([2.0, 4.0], False, 0), ([20.0, 0.9], False, 1)],
)
def test_a_mean_and_never_slower(gains, met, missing):
    rows = [row(shape=str(i), fastdiff=1.0, eager=gain) for i, gain in enumerate(gains)]
    verdict = judge(MEAN, document(*rows))
    assert (verdict.met, len(verdict.missing), verdict.count) == (met, missing, 2)
    assert verdict.mean == pytest.approx((gains[0] * gains[1]) ** 0.5)
    assert verdict.worst[1] == min(gains)
    assert ("met" if met else "MISSED") in str(verdict)


def test_a_limit_and_what_was_not_measured():
    (limit,) = (target for target in targets.TARGETS if target.key == "overhead")
    tiny = [row(mode="given", fastdiff=7e-6), row(mode="seed", fastdiff=9e-6)]
    verdict = judge(limit, document(overhead=tiny))
    assert verdict.met is False
    assert verdict.worst == ("q_sample ddpm_256 b128 fp32 nchw seed", pytest.approx(9.0))
    assert judge(limit, document(overhead=tiny[:1])).met
    assert judge(limit, document()).met is None


def test_small_tensors_do_not_count_as_out_of_cache():
    (target,) = (target for target in targets.TARGETS if target.key == "q_sample-copy")
    small, large = row(fastdiff=1.0, copy_=0.7), row(fastdiff=1.0, copy_=0.9)
    large["contenders"]["copy_"] = contender(1.0, moved=256 << 20)
    large["contenders"]["fastdiff"] = contender(1.0, moved=230 << 20)
    verdict = judge(target, document(small, large))
    assert (verdict.met, verdict.count) == (True, 1)
    assert verdict.mean == pytest.approx(230 / 256)


OLD = document(
    row(shape="a", fastdiff=1.0, eager=2.0), row(shape="b", fastdiff=1.0, eager=2.0),
    row(shape="c", fastdiff=1.0, eager=2.0),
)  # fmt: skip


def changed(**factors) -> dict:
    """OLD with our times multiplied, by shape."""
    new = copy.deepcopy(OLD)
    for measured in new["ops"]:
        measured["contenders"]["fastdiff"]["median_s"] *= factors.get(measured["shape"], 1.0)
    return new


def test_a_regression_beyond_the_noise_is_named(capsys):
    assert compare.print_comparison(OLD, changed(b=1.2)) == 1
    printed = capsys.readouterr().out
    assert "q_sample b fp32 nchw given, fastdiff: 1.20x the old time (noise 5%)" in printed
    assert "q_sample a" not in printed


def test_noise_drift_and_improvements_are_no_regressions(capsys):
    assert compare.print_comparison(OLD, changed(b=1.04, c=0.5)) == 0
    assert "faster:\n  q_sample c" in capsys.readouterr().out
    noisy = changed(b=1.2)
    noisy["ops"][1]["contenders"]["fastdiff"]["spread"] = 0.3
    assert compare.print_comparison(OLD, noisy) == 0
    slower_machine = changed()
    for measured in slower_machine["ops"]:
        for timing in measured["contenders"].values():
            timing["median_s"] *= 1.5
    assert compare.print_comparison(OLD, slower_machine) == 0
    assert "the others' times are 1.50x the old ones" in capsys.readouterr().out


def test_what_became_wrong_and_other_machines_are_named(capsys):
    broken = changed()
    del broken["ops"][0]["contenders"]["fastdiff"]
    broken["ops"][0]["wrong"] = {"fastdiff": "error 3"}
    broken["machine"] = {**MACHINE, "threads": 4}
    assert compare.print_comparison(OLD, broken) == 1
    printed = capsys.readouterr().out
    assert "q_sample a fp32 nchw given, fastdiff: error 3" in printed
    assert "other threads: 2 in the old report, 4 now" in printed
    assert compare.print_comparison(document(), OLD) == 1


def test_compare_option_fails_the_run(monkeypatch, tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(OLD))
    monkeypatch.setattr(command, "collect", lambda options: changed(a=3.0))
    assert command.main(["q_sample", "--compare", str(old)]) == 1
    assert "3.00x the old time" in capsys.readouterr().out
    monkeypatch.setattr(command, "collect", lambda options: changed())
    assert command.main(["q_sample", "--compare", str(old)]) == 0


def test_notes_are_read_by_target(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("Reasons.\n\n## overhead\nPython.\n\n## q_sample-copy\nTwo\nlines.\n")
    assert page.read_notes(path) == {"overhead": "Python.", "q_sample-copy": "Two\nlines."}
    path.write_text("## overhaed\nPython.\n")
    with pytest.raises(ValueError, match="note on 'overhaed'; the targets are group_norm"):
        page.read_notes(path)


def test_a_missed_target_is_explained_and_only_the_made_part_is_replaced():
    slow = row("group_norm_silu", "vae b1", "forward", fastdiff=1.0, eager=0.5)
    notes = {"group_norm_silu-forward-eager": "It is memory."}
    text = page.render(document(slow), notes, ["a.png"], "python -m benchmarks")
    assert (
        "| **missed** | 0.50x | 0.50x: group_norm_silu vae b1 fp32 nchw forward | 1 of 1 |" in text
    )
    assert "0.50x.\n\nIt is memory." in text
    assert "No reason" not in text
    assert "No reason is written down yet." in page.render(document(slow), {}, [], "c")
    unmeasured = {"q_sample-copy": "It is not measured."}
    assert "It is not measured." not in page.render(document(slow), unmeasured, [], "c")
    assert "![a](a.png)" in text
    old = f"Head\n{page.BEGIN}\nold{page.END}\nTail\n"
    assert page.replace_made_part(old, text) == f"Head\n{page.BEGIN}\n{text}{page.END}\nTail\n"
    with pytest.raises(ValueError, match="the page has no part between"):
        page.replace_made_part("Head", text)


def test_reports_of_other_machines_stay_on_the_page(tmp_path):
    slow = row("group_norm_silu", "vae b1", "forward", fastdiff=1.0, eager=0.5)
    (tmp_path / "old.json").write_text(json.dumps(document(slow)))
    assert page.other_machines("old", tmp_path) == ""
    text = page.other_machines("new", tmp_path)
    assert "### Earlier, on another machine" in text
    assert "Measured on " in text
    assert "| **missed** | 0.50x | 0.50x: group_norm_silu vae b1 fp32 nchw forward |" in text


def test_the_page_of_whole_networks():
    measured = row("training_step", "digits b64", "eager", fastdiff=0.5, diffusers=1.0)
    measured |= {"images": 64, "peak_bytes": {"fastdiff": 10 << 20, "diffusers": None}}
    wrong = {**measured, "layout": "channels_last", "wrong": {"diffusers": "its loss is nan"}}
    curve = {"op": "sampling", "network": "digits", "axis": "steps", "values": [1, 2]}
    curve |= {"slopes": {"fastdiff": 0.987}}
    text = page.render(document(end_to_end=[measured, wrong], growth=[curve]), {}, [], "c")
    assert "| training_step digits b64 fp32 nchw eager | 128.00 (10) | 64.00 |" in text
    assert "| training_step digits b64 fp32 channels_last eager | 128.00 (10) | wrong |" in text
    assert "| sampling digits | steps | 1 2 | 0.99 |" in text


@pytest.mark.parametrize(("says", "clock"), [("1980", 1980), ("[N/A]", None), ("", None)])
def test_the_clock_of_a_gpu_is_noted_if_it_can_be_read(says, clock, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.clock_mhz(torch.device("cuda", 0)) == clock


def test_plots_of_every_kind(tmp_path):
    rows = [
        row(shape=str(size), fastdiff=1.0, eager=2.0, diffusers=3.0, copy_=0.5) for size in range(2)
    ]
    curve = {"op": "sampling", "network": "digits", "axis": "steps", "values": [1, 2, 4]}
    curve |= {"seconds": {"fastdiff": [1.0, 2.0, 4.0]}, "slopes": {"fastdiff": 1.0}}
    paths = plots.write(document(*rows, growth=[curve]), tmp_path, "x")
    assert [p.name for p in paths] == ["x-speed_ups.png", "x-roofline.png", "x-growth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    assert not plots.write(document(), tmp_path, "y")


def test_the_committed_page_is_what_the_committed_numbers_make():
    """Reports of other machines may lie beside the one that the page shows."""
    text = page.PAGE.read_text()
    made = [
        page.docs_page(json.loads(path.read_text()), path.stem, text, page.read_notes())
        for path in page.RESULTS.glob("*.json")
    ] or [page.replace_made_part(text, page.NOTHING)]
    assert text in made, "run `python -m benchmarks.page benchmarks/results/NAME.json --docs`"


def test_geometric_mean():
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
