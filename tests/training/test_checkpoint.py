import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from training.runs import craft

from fastdiff.training import Checkpoint, DamagedCheckpoint
from fastdiff.training.checkpoint import load, load_newest, save
from fastdiff.training.files import write_atomic, write_new


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    return Checkpoint(
        step=step,
        meta={"unet": {"channels": 8}, "image_shape": [1, 8, 8]},
        model={"weight": weight.to(memory_format=torch.channels_last)},
        emas=[{"weight": weight * 2}, {"weight": weight * 3}],
        state={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "list": [1, "a"]},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    saved = make(5)
    loaded = load(save(tmp_path, saved, keep=2))
    assert loaded.step == 5
    assert loaded.meta == saved.meta
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
    for ours, theirs in zip(loaded.emas, saved.emas, strict=True):
        assert torch.equal(ours["weight"], theirs["weight"])
    assert loaded.state == saved.state


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 100):
        save(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000100"]
    assert load_newest(tmp_path, pytest.fail).step == 100


@pytest.mark.parametrize(("keep", "kept"), [(0, [400]), (1, [400]), (2, [300, 400])])
def test_what_is_kept_of_a_run_that_went_back_is_good(tmp_path, keep, kept):
    """Step 600 is damaged, the run goes on from 300: 600 is no longer the newest."""
    save(tmp_path, make(300), keep=2)
    truncate(save(tmp_path, make(600), keep=2) / "model.safetensors")
    assert load_newest(tmp_path, lambda message: None).step == 300
    save(tmp_path, make(400), keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert load_newest(tmp_path, pytest.fail).step == 400


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "ema-2.safetensors", "state.pt"]
)
def test_damage_is_found_skipped_and_told(tmp_path, name, damage):
    save(tmp_path, make(1), keep=2)
    damage(save(tmp_path, make(2), keep=2) / name)
    told = []
    assert load_newest(tmp_path, told.append).step == 1
    assert len(told) == 1
    assert "step-00000002" in told[0]
    assert name in told[0]
    # Going on from step 1 reaches step 2 again: the damaged one makes room.
    save(tmp_path, make(2), keep=2)
    assert load_newest(tmp_path, pytest.fail).step == 2


def test_only_damaged_checkpoints_are_an_error_and_none_are_none(tmp_path):
    assert load_newest(tmp_path / "absent", pytest.fail) is None
    assert load_newest(tmp_path, pytest.fail) is None
    (save(tmp_path, make(1), keep=1) / "checkpoint.json").write_text("{")
    with pytest.raises(DamagedCheckpoint, match="every checkpoint"):
        load_newest(tmp_path, lambda message: None)


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(tmp_path):
    save(tmp_path, make(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 100 bytes: writing fails half-way, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            save(tmp_path, make(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]
    assert load_newest(tmp_path, pytest.fail).step == 1


def test_nothing_loaded_runs_code(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path / "checkpoints", make(1), keep=1)
    torch.save({"optimizer": Crafted()}, path / "state.pt")
    manifest = json.loads((path / "checkpoint.json").read_text())
    digest = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    manifest["sha256"]["state.pt"] = digest
    craft(path / "checkpoint.json", manifest)
    with pytest.raises(DamagedCheckpoint, match="refused to load"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_write_atomic_replaces_or_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"never")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_write_new_writes_once(tmp_path, monkeypatch, links):
    def refuse(source, target):
        raise OSError(1, "Operation not permitted")

    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    write_new(path, b"first")
    with pytest.raises(FileExistsError):
        write_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_no_file_but_those_of_a_checkpoint_is_opened(tmp_path):
    """A manifest may have come from anywhere: names in it that climb out are not followed."""
    path = save(tmp_path / "checkpoints", make(1), keep=1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    manifest = json.loads((path / "checkpoint.json").read_text())
    for name in ("../../secret", str(secret), "ema-../../../secret.safetensors"):
        manifest["sha256"][name] = hashlib.sha256(b"").hexdigest()
    craft(path / "checkpoint.json", manifest)
    assert len(load(path).emas) == 2
