"""Files from somebody else that mean harm: none runs code, fills the memory or reaches outside."""

import gzip
import hashlib
import io
import json
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from training.runs import craft, trainer

from fastdiff.training import (
    Checkpoint,
    DamagedCheckpoint,
    RunFolder,
    TrainConfig,
    UserError,
    checkpoint,
    load_dataset,
    load_run,
)
from fastdiff.training.config_file import read_config_file


class Crafted:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path):
    """A folder that exists only if crafted code ran."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def test_a_crafted_cifar10_batch(tmp_path, ran):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": Crafted(ran)}))
    with pytest.raises(UserError, match=r"refused to load .*mkdir"):
        load_dataset("cifar10", str(tmp_path))


def test_a_crafted_object_array(tmp_path, ran):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.array([Crafted(ran)], object))
    with pytest.raises(UserError, match=r"refused to load images\.npy, which holds pickled"):
        load_dataset(str(path))


def test_a_crafted_checkpoint(tmp_path, ran):
    folder = tmp_path / "checkpoints"
    weights = {"w": torch.ones(2)}
    path = checkpoint.save(folder, Checkpoint(3, {}, weights, [weights], {"a": 1}), keep=1)
    buffer = io.BytesIO()
    torch.save({"optimizer": Crafted(ran)}, buffer)
    manifest = json.loads((path / "checkpoint.json").read_text())
    for content in (buffer.getvalue(), pickle.dumps(Crafted(ran))):
        (path / "state.pt").write_bytes(content)
        manifest["sha256"]["state.pt"] = hashlib.sha256(content).hexdigest()
        craft(path / "checkpoint.json", manifest)
        with pytest.raises(DamagedCheckpoint, match=r"refused to load .*could run code") as error:
            checkpoint.load(path)
        assert "weights_only" not in str(error.value)
        with pytest.raises(DamagedCheckpoint, match="every checkpoint"):
            checkpoint.load_newest(folder, lambda message: None)


HUGE = 1 << 40


def test_a_checkpoint_that_describes_more_than_its_weights(tmp_path, dataset, monkeypatch):
    """Sizes somebody made up are compared with the weights before anything has them."""
    trainer(tmp_path, dataset, steps=1).train()
    path = tmp_path / "checkpoints/step-00000001/checkpoint.json"
    manifest = json.loads(path.read_text())
    for name in ("randn", "empty", "rand", "zeros", "ones", "full", "arange"):
        limited = _no_larger_than_a_mebibyte(getattr(torch, name))
        monkeypatch.setattr(torch, name, limited)
    unlike = "RUN: checkpoint step-00000001 in .*: its weights do not fit the U-Net"
    deep = {"channel_mult": [1, 2] * 5000, "sample_size": 8 << 9999}
    for part, changes, message in (
        ("unet", {"channels": HUGE}, unlike),
        ("unet", {"channels": 1 << 62}, unlike),  # more elements than 64 bits count
        ("unet", {"in_channels": HUGE}, unlike),
        ("unet", {"num_classes": HUGE}, unlike),
        ("unet", {"num_res_blocks": HUGE}, unlike),
        ("unet", {**deep, "attention_resolutions": [8]}, unlike),
        ("unet", deep, r"attention_resolutions must be among .* \.\.\.$"),
        (
            "unet",
            {"sample_size": HUGE, "attention_resolutions": [HUGE // 2]},
            r"images of shape \[1, 8, 8\] do not fit the U-Net",
        ),
        (None, {"image_shape": [1, 8, -8]}, r"images of shape \[1, 8, -8\]"),
        (None, {"image_shape": [1, 8, 7]}, r"images of shape \[1, 8, 7\]"),
        (None, {"image_shape": [3, 8, 8]}, r"images of shape \[3, 8, 8\]"),
        (None, {"image_shape": [8, 8]}, r"images of shape \[8, 8\]"),
        (None, {"image_shape": 8}, "images of shape 8"),
        ("settings", {"timesteps": HUGE}, "--timesteps 1099511627776: give at most 1000000"),
        ("settings", {"threads": HUGE}, "--threads 1099511627776: give at most 1024"),
    ):
        crafted = json.loads(json.dumps(manifest))
        (crafted if part is None else crafted[part]).update(changes)
        craft(path, crafted)
        with pytest.raises(UserError, match=message) as error:
            load_run(tmp_path)
        assert len(str(error.value)) < 3000
    path.write_text(json.dumps(manifest))
    assert load_run(tmp_path).step == 1


def _no_larger_than_a_mebibyte(make):
    def limited(*args, **kwargs):
        tensor = make(*args, **kwargs)
        assert tensor.is_meta or tensor.nbytes < 1 << 20
        return tensor

    return limited


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "name:os.system", "module:os"])
def test_crafted_yaml(tmp_path, ran, tag):
    path = tmp_path / "run.yaml"
    path.write_text(f"steps: !!python/{tag} ['{ran}']\n")
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML or JSON: .*python/"):
        read_config_file(path)


def test_yaml_that_doubles_itself_is_not_printed_in_full(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["l0: &l0 [1, 1]"] + [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 40)]
    path.write_text("\n".join([*lines, "steps: *l39"]))  # 2**40 numbers
    steps = {"steps": read_config_file(path)["steps"]}
    with pytest.raises(UserError, match="steps: expected int, got") as error:
        TrainConfig().updated(steps, "--config")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_config_file_nested_deeper_than_the_stack(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    path.write_text(("steps = " if suffix == "toml" else "steps: ") + "[" * 100_000)
    with pytest.raises(UserError, match="not valid"):
        read_config_file(path)


def test_an_image_of_another_format_than_its_name_says(tmp_path):
    # Pillow would start Ghostscript, which runs programs, to decode this.
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(program)
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(UserError, match=r"a\.png \(not an image in a known format\)"):
        load_dataset(str(tmp_path))


def _png(width, height, content):
    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 0, 0, 0, 0))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_decompression_bomb_among_images(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "bomb.png").write_bytes(_png(60_000, 60_000, zlib.compress(bytes(1 << 20))))
    assert (tmp_path / "bomb.png").stat().st_size < 2000
    with pytest.raises(UserError, match=r"refused to decode .*bomb\.png.*decompression bomb"):
        load_dataset(str(tmp_path), image_size=8)


def npy_header(shape, descr="|u1"):
    buffer = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def write_npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_zip_bomb(tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    size = 300 << 20
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w") as file,
    ):
        file.write(npy_header((300, 1024, 1024)))
        for _ in range(300):
            file.write(bytes(1 << 20))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=rf"refused to unpack \d+ bytes to {size}.*bomb"):
        load_dataset(str(path))


def test_an_array_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / "images.npz"
    for shape in ((1 << 20, 1 << 10, 1 << 10), (1, 2, 2)):
        write_npz(path, **{"images.npy": npy_header(shape) + bytes(64)})
        with pytest.raises(UserError, match=r"is damaged: its header declares .* but it holds 64"):
            load_dataset(str(path))


def test_more_pixels_than_memory(tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    np.savez(path, np.zeros((3, 8, 8), np.uint8))
    monkeypatch.setattr("fastdiff.training.archives.memory_bytes", lambda: 191)
    with pytest.raises(UserError, match="do not fit into the memory"):
        load_dataset(str(path))
    monkeypatch.setattr("fastdiff.training.archives.memory_bytes", lambda: 192)
    assert len(load_dataset(str(path))) == 3


@pytest.mark.parametrize("declared", [(60_000, 28, 28), (2**32 - 1,) * 3])
def test_a_gzip_bomb(tmp_path, declared):
    lengths = b"".join(n.to_bytes(4, "big") for n in declared)
    content = bytes((0, 0, 8, 3)) + lengths
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(100):
            file.write(bytes(1 << 20))
    labels = bytes((0, 0, 8, 1)) + (1).to_bytes(4, "big") + b"\0"
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    # What goes on behind the pixels is not unpacked; what declares too much, not at all.
    message = "is damaged" if declared[0] == 60_000 else "refused to unpack"
    with pytest.raises(UserError, match=message):
        load_dataset("fashion-mnist", str(tmp_path))


def test_a_huge_cifar10_batch_is_not_read(tmp_path):
    for i in range(1, 6):
        with (tmp_path / f"data_batch_{i}.bin").open("wb") as file:
            file.truncate(3073 << 15)  # sparse: takes no room on the disk
    with pytest.raises(UserError, match="is no CIFAR-10 batch: it has 100696064 bytes"):
        load_dataset("cifar10", str(tmp_path))


def test_archive_members_that_climb_are_only_names(tmp_path):
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/images.npz"
    content = npy_header(images.shape) + images.tobytes()
    write_npz(path, **{"images.npy": content, "../evil.npy": content, "/evil.npy": content})
    assert np.array_equal(load_dataset(str(path)).images[..., 0], images)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "images.npz"]


@pytest.mark.parametrize("name", ["samples", "checkpoints/step-00000003", "evaluation/bpd.json"])
def test_a_run_folder_with_a_link_out_of_it(tmp_path, name):
    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig())
    outside = tmp_path / "outside"
    outside.mkdir()
    link = run.path / name
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        link.rmdir()
    link.symlink_to("../" * (name.count("/") + 1) + "outside")
    with pytest.raises(UserError, match=rf"RUN: .*{link.name} is a link that leads out of the run"):
        load_run(run.path)
    # One that stays inside is nobody's business, nor is the way to the run.
    link.unlink()
    link.symlink_to(run.path / "config.json")
    (tmp_path / "way").symlink_to("run")
    with pytest.raises(UserError, match="checkpoint"):
        load_run(tmp_path / "way", warn=lambda message: None)
