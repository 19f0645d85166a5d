"""What of a folder is read, what are its classes, and what is said about the rest."""

import os

import numpy as np
import pytest
from PIL import Image

from fastdiff.training import UserError, data, load_dataset
from fastdiff.training.image_files import image_suffixes


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save(path, size=(8, 8), channels=3, **options):
    """An image of noise that differs from file to file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    pixels = rng.integers(0, 256, (*size, channels), dtype=np.uint8).squeeze()
    Image.fromarray(pixels).save(path, **options)


def load(folder, **options):
    said = []
    return load_dataset(str(folder), warn=said.append, **options), said


def test_every_format_that_pillow_writes_and_reads_is_read(tmp_path):
    """By its registered ending, whatever that is; nothing is left out without a word."""
    Image.init()
    written = {}
    for suffix, name in Image.registered_extensions().items():
        if name not in Image.OPEN or name not in Image.SAVE:
            continue
        for mode in ("RGB", "L", "1", "P", "RGBA"):  # the first that the format has
            path = tmp_path / f"{len(written):02}{suffix}"
            try:
                Image.linear_gradient("L").resize((32, 32)).convert(mode).save(path)
            except (OSError, ValueError, KeyError):
                path.unlink(missing_ok=True)
                continue
            written[path.name] = name
            break
    drawn = {name for name, kind in written.items() if kind in ("EPS", "PDF", "WMF")}
    assert drawn  # what is no grid of pixels is named and counted
    for suffix in (
        "jfif",
        "jpe",
        "mpo",
        "jp2",
        "tga",
        "pbm",
        "pgm",
        "pcx",
        "qoi",
        "dds",
        "ico",
        "sgi",
    ):
        assert f".{suffix}" in image_suffixes()
    dataset, said = load(tmp_path, image_size=32)
    assert len(dataset) == len(written) - len(drawn)
    assert len(dataset) > 25
    assert len(said) == 1
    assert "left out: files that are no known images: " in said[0]
    assert sum(int(part.split()[0]) for part in said[0].split("images: ")[1].split(", ")) == len(
        drawn
    )


def test_what_is_not_read_is_counted_by_ending_and_named(tmp_path):
    save(tmp_path / "a/1.png")
    for k in range(8):
        (tmp_path / f"a/{k}.heic").write_bytes(b"ftypheic")
    for name in (
        "a/notes.TXT",
        "list",
        "a/list",
        "b.json",
        "c.csv",
        "d.x1",
        "e.x2",
        "f.x3",
        "g." + "x" * 99,
    ):
        (tmp_path / name).write_text("")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "a/.gitkeep"):  # nobody misses these
        (tmp_path / name).write_text("")
    dataset, said = load(tmp_path)
    assert len(dataset) == 1
    (line,) = said
    assert "no known images: 8 .heic (such as a/0.heic), 2 without an ending (such as list)" in line
    assert line.endswith("4 of other kinds")
    assert "DS_Store" not in line
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(UserError, match=r"no images found in the folder \(left out: .*8 \.heic"):
        load(tmp_path)


def test_formats_told_by_a_byte_or_none_are_read_under_their_own_name_only(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "good.tga")
    (tmp_path / "tga.png").write_bytes((tmp_path / "good.tga").read_bytes())
    (tmp_path / "jpeg.png").unlink(missing_ok=True)
    save(tmp_path / "jpeg.webp", format="JPEG")  # a misnomer of the web
    dataset, said = load(tmp_path)
    assert len(dataset) == 3
    assert "skipped 1 of 4 images" in said[0]
    assert "tga.png (not an image" in said[0]


@pytest.mark.parametrize("suffix", ["tiff", "gif", "png", "webp"])
def test_later_pages_and_frames_are_counted(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (60 * k, 0, 0)) for k in range(4)]
    for k in range(5):
        frames[1].save(
            tmp_path / f"many{k}.{suffix}", save_all=True, append_images=frames[2:], lossless=True
        )
    frames[3].save(tmp_path / f"one.{suffix}")
    dataset, said = load(tmp_path, channels=3)
    assert len(dataset) == 6
    assert np.abs(dataset.images[0].astype(int) - (60, 0, 0)).max() <= 3
    assert len(said) == 1
    assert "10 later pages or frames of 5 of 6 images are not read, the first one of" in said[0]
    assert f"many0.{suffix}, many1.{suffix}" in said[0]
    assert said[0].endswith("and 2 more")


def test_folders_that_are_links_are_followed_once(tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "data"
    for k in range(3):
        save(elsewhere / f"cats/{k}.png")
        save(root / f"zebra/{k}.png")
    (elsewhere / "cats/up").symlink_to(elsewhere / "cats", target_is_directory=True)
    (root / "cat").symlink_to(elsewhere / "cats", target_is_directory=True)
    (root / "again").symlink_to(root / "zebra", target_is_directory=True)  # sorts before it
    (root / "self").symlink_to(".", target_is_directory=True)
    (root / "zebra/above").symlink_to("../..", target_is_directory=True)
    (root / "gone").symlink_to("nowhere", target_is_directory=True)
    (root / "loop").symlink_to("loop", target_is_directory=True)
    dataset, said = load(root)
    assert dataset.classes == ("cat", "zebra")
    assert np.bincount(dataset.labels).tolist() == [3, 3]
    (line,) = said
    assert "links to folders that are read already, or above: " in line
    for name in ("again", "self", "zebra/above", "cat/up"):
        assert name in line
    assert "links to nothing: gone, loop" in line
    # The folder itself may be reached through a link too.
    (tmp_path / "way").symlink_to(root, target_is_directory=True)
    assert len(load(tmp_path / "way")[0]) == 6


def test_hidden_and_system_folders_are_no_classes(tmp_path):
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbs", "a", "b", "a/.cache"):
        save(tmp_path / name / "1.png")
    (tmp_path / "a/._1.png").write_bytes(b"\0\5\x16\7")  # what macOS keeps about 1.png
    dataset, said = load(tmp_path)
    assert dataset.classes == ("a", "b")
    (line,) = said
    assert "hidden, or kept by the system: .ipynb_checkpoints, .thumbs, @eaDir, __MACOSX, " in line
    # One that is asked for is read.
    assert len(load(tmp_path / ".thumbs")[0]) == 1


def test_a_run_folder_in_the_data_is_not_trained_on(tmp_path):
    save(tmp_path / "a/1.png")
    save(tmp_path / "b/1.png")
    save(tmp_path / "runs/x/samples/step-00000003.png")
    (tmp_path / "runs/x/checkpoints").mkdir()
    (tmp_path / "runs/x/config.json").write_text("{}")
    dataset, said = load(tmp_path)
    assert dataset.classes == ("a", "b")
    assert "run folders: runs/x" in said[0]


@pytest.mark.parametrize("in_memory", [True, False])
def test_classes_without_a_usable_image_are_none(tmp_path, monkeypatch, in_memory):
    for name in "abdf":
        save(tmp_path / name / "1.png", size=(16, 16))
    (tmp_path / "b/1.png").write_bytes(b"nothing")
    (tmp_path / "d/1.png").write_bytes((tmp_path / "d/1.png").read_bytes()[:-80])
    (tmp_path / "c").mkdir()  # no image at all
    (tmp_path / "e").mkdir()
    (tmp_path / "e/1.heic").write_text("")
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    dataset, said = load(tmp_path)
    text = "\n".join(said)
    assert "no usable image in b, which is no class then" in text
    assert "no image in the subfolders c, e" in text
    if in_memory:
        assert "no usable image in d, which is no class then" in text
    assert dataset.classes == (("a", "f") if in_memory else ("a", "d", "f"))
    assert dataset.num_classes == len(dataset.classes)
    assert dataset.labels.tolist() == list(range(len(dataset.classes)))


def test_stray_images_beside_classes_are_said_to_cost_the_classes(tmp_path):
    for name in ("a/1.png", "b/1.png", "stray.png"):
        save(tmp_path / name)
    dataset, said = load(tmp_path)
    assert dataset.labels is None
    assert said == [
        f"--data {tmp_path}: 1 of 3 images lie in the folder itself, beside a, b, so that no image "
        "has a class; move them into a subfolder if the subfolders are classes"
    ]


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (("train", "test"), "test, train are taken for classes; .*: --data .*/train$"),
        (("Train", "valid", "x"), "Train, valid are taken for classes; .*: --data .*/Train$"),
        (("train/cat", "train/dog"), "train is taken for a class; .*: --data .*/train$"),
        (("images/cat", "images/dog"), "one class only, images; .* cat, dog are .*/images$"),
        (("train", "plane", "ship"), None),  # a class of trains
        (("images",), None),
    ],
)
def test_subfolders_that_are_hardly_classes_are_asked_about(tmp_path, names, fragment):
    for name in names:
        save(tmp_path / name / "1.png")
    _, said = load(tmp_path)
    if fragment is None:
        assert said == []
    else:
        with pytest.raises(AssertionError, match=fragment):
            raise AssertionError("\n".join(said))


def test_names_that_would_drive_a_terminal_are_shown_with_escapes(tmp_path):
    names = ("\x1b[31mred", "two\nlines", "left\u202eright", os.fsdecode(b"caf\xe9"), "\r", "\x07")
    for name in names:
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / f"{name}.png").write_bytes(b"no image")
        (tmp_path / "bad" / name / f"1.{name}").write_bytes(b"")
        save(tmp_path / "good" / name / f"{name}.png")
    save(tmp_path / "good/mixed/1.png", size=(9, 9))
    said = []
    with pytest.raises(UserError) as error:
        load_dataset(str(tmp_path / "bad"), warn=said.append)
    said.append(str(error.value))
    with pytest.raises(UserError, match="mixed sizes") as error:
        load_dataset(str(tmp_path / "good"), warn=said.append)
    said.append(str(error.value))
    dataset = load_dataset(str(tmp_path / "good"), image_size=8, warn=said.append)
    assert set(names) <= set(dataset.classes)  # as they are, where nobody prints them
    for name in names:
        for kind in ("\x1b[31mred.npz", "gone\nfolder"):
            with pytest.raises(UserError) as error:
                load_dataset(str(tmp_path / "good" / name / kind), warn=said.append)
            said.append(str(error.value))
    assert len(said) >= 15
    for line in said:
        assert line.isprintable(), ascii(line)
    assert "\\x1b[31mred" in said[0]


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"none of 2 images .*pipe\.png \(not a regular file\)"):
        load(tmp_path)
    save(tmp_path / "good.png")
    dataset, said = load(tmp_path)
    assert len(dataset) == 1
    assert "skipped 2 of 3 images" in said[1]
    for name in ("pipe.npz", "pipe.png", "zero.png"):
        with pytest.raises(UserError, match=r"not a regular file|neither a folder"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "hf:" + "x" * 300 + "\0"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match="--data"):
        load_dataset(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    save(tmp_path / "a/1.png")
    save(tmp_path / "a/2.png")
    (tmp_path / "a/1.png").chmod(0)
    dataset, said = load(tmp_path)
    assert len(dataset) == 1
    assert "1.png (Permission denied)" in said[0]
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot read .*a: Permission denied"):
            load(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o700)
