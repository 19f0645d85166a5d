"""Folders of images: modes, sizes, classes, and files that cannot be read."""

import zlib

import numpy as np
import pytest
from PIL import Image

from fastdiff.training import RunError, UserError, data, load_dataset


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_folder_of_grey_images_with_classes(tmp_path, rng):
    images = rng.integers(0, 256, (4, 6, 8), dtype=np.uint8)
    for k, kind in enumerate(("cat", "dog", "cat", "dog")):
        save_image(tmp_path / kind / f"{k}.png", images[k])
    (tmp_path / "notes.txt").write_text("not an image")
    said = []
    dataset = load_dataset(str(tmp_path), warn=said.append)
    assert said == [
        f"--data {tmp_path}: left out: files that are no known images: 1 .txt (such as notes.txt)"
    ]
    assert dataset.shape == (6, 8, 1)
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(dataset.images[..., 0], images[[0, 2, 1, 3]])


def test_a_folder_with_colour_is_rgb_and_has_no_classes(tmp_path, rng):
    grey = rng.integers(0, 256, (5, 5), dtype=np.uint8)
    colour = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", grey)
    save_image(tmp_path / "b.png", colour)
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels is None
    assert np.array_equal(dataset.images[0], np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(dataset.images[1], colour)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_converted_alike_wherever_they_come_from(tmp_path, rng, monkeypatch, channels):
    """To grey by Pillow's weights, to RGB by copies; of files, of arrays, and on demand."""
    given = rng.integers(0, 256, (5, 6, 7, 4 - channels), dtype=np.uint8)
    for k, image in enumerate(given):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{k}.png")
    np.savez(tmp_path / "images.npz", images=given)
    files = load_dataset(str(tmp_path), channels=channels)
    arrays = load_dataset(str(tmp_path / "images.npz"), channels=channels)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    on_demand = load_dataset(str(tmp_path), channels=channels)
    assert files.shape == arrays.shape == on_demand.shape == (6, 7, channels)
    assert np.array_equal(files.images, on_demand.read(np.arange(5)))
    assert np.array_equal(files.images, arrays.images)
    luma = given @ [0.299, 0.587, 0.114] if channels == 1 else given[..., 0]
    assert np.abs(files.images - luma[..., None]).max() <= 0.51


def test_a_folder_too_large_for_memory_is_decoded_on_demand(tmp_path, rng, monkeypatch):
    for k in range(5):
        save_image(tmp_path / f"{k}.png", rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    in_memory = load_dataset(str(tmp_path))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    on_demand = load_dataset(str(tmp_path))
    assert isinstance(on_demand, data.EncodedDataset)
    assert on_demand.shape == in_memory.shape
    indices = np.array([3, 0, 3, 4])
    assert np.array_equal(on_demand.read(indices), in_memory.read(indices))


def test_image_size_crops_the_centre(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    save_image(tmp_path / "a.png", wide)
    save_image(tmp_path / "b.png", np.full((8, 8), 200, np.uint8))
    with pytest.raises(UserError, match=r"a\.png is 12x4, b\.png is 8x8; .*--image-size"):
        load_dataset(str(tmp_path))
    dataset = load_dataset(str(tmp_path), image_size=4)
    assert dataset.shape == (4, 4, 1)
    assert (dataset.images == 200).all()
    with pytest.raises(UserError, match="--image-size applies to a folder"):
        load_dataset("digits", image_size=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path, orientation):
    upright = np.zeros((4, 6), np.uint8)
    upright[0] = 250  # sky above
    upright[:, 0] = 120  # a tree on the left
    # How a camera held another way stores the scene (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    dataset = load_dataset(str(tmp_path))
    assert dataset.shape == (4, 6, 1)
    assert np.array_equal(dataset.images[0, :, :, 0], upright)


def test_what_is_transparent_is_white(tmp_path):
    clear_red = np.zeros((2, 2, 4), np.uint8)
    clear_red[0] = (255, 0, 0, 255)
    clear_red[1] = (255, 0, 0, 0)
    save_image(tmp_path / "rgba/a.png", clear_red)
    expected = np.array([[[255, 0, 0]] * 2, [[255, 255, 255]] * 2])
    assert np.array_equal(load_dataset(str(tmp_path / "rgba")).images[0], expected)

    grey = np.full((2, 2), 90, np.uint8)
    (tmp_path / "la").mkdir()
    pixels = Image.fromarray(grey)
    pixels.putalpha(Image.fromarray(np.array([[255, 255], [0, 0]], np.uint8)))
    pixels.save(tmp_path / "la/a.png")
    dataset = load_dataset(str(tmp_path / "la"))
    assert dataset.shape == (2, 2, 1)
    assert dataset.images[0, :, :, 0].tolist() == [[90, 90], [255, 255]]

    (tmp_path / "palette").mkdir()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette/a.png", transparency=1)
    images = load_dataset(str(tmp_path / "palette")).images
    assert images[0].tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    levels = np.array([[0, 128, 129, 257, 30_000, 65_406, 65_407, 65_535]], np.uint16)
    expected = np.rint(levels / 65_535 * 255)[0]
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "b.tiff")
    Image.fromarray(levels.astype(">u2").view("<u2").byteswap()).save(tmp_path / "c.png")
    (tmp_path / "d.pgm").write_bytes(b"P5 8 1 65535 " + levels.astype(">u2").tobytes())
    dataset = load_dataset(str(tmp_path))
    assert dataset.shape == (1, 8, 1)
    for image in dataset.images:
        assert np.array_equal(image[0, :, 0], expected)


def _deep_png(path, values):
    Image.fromarray(values.astype(np.uint16)).save(path)


def _deep_tiff(path, values):
    Image.fromarray(values.astype(np.uint16)).save(path.with_suffix(".tiff"))


def _deep_colours(path, values):
    """A PNG of 16 bits in red, green and blue, which Pillow reads but does not write."""

    def chunk(name, content):
        body = name + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    height, width = values.shape
    rows = np.repeat(values[..., None], 3, axis=2).astype(">u2").reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    parts = (chunk(b"IHDR", size + bytes((16, 2, 0, 0, 0))), chunk(b"IDAT", packed))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


@pytest.mark.parametrize("write", [_deep_png, _deep_tiff, _deep_colours])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("brightest", "factor"), [(4095, 16), (255, 256), (1023, 64), (40_000, 0)])
def test_sixteen_bits_that_hold_fewer_are_said(
    tmp_path, monkeypatch, write, in_memory, brightest, factor
):
    for k in range(5):
        values = np.linspace(0, brightest * (k + 1) // 5, 64, dtype=int).reshape(8, 8)
        write(tmp_path / f"{k}.png", values)
    save_image(tmp_path / "eight.png", np.full((8, 8), 200, np.uint8))
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    said = []
    dataset = load_dataset(str(tmp_path), warn=said.append)
    if not in_memory:
        dataset.read(np.arange(6))  # what was said once is not said again
    if not factor:
        assert said == []
        return
    (line,) = said
    assert f"the brightest value in 5 images of 16 bits is {brightest} of 65535" in line
    assert f"multiply them by {factor} or" in line


def test_signed_pixels_are_said_to_be_signed(tmp_path):
    save_image(tmp_path / "good.png", np.full((8, 8), 200, np.uint8))
    bright = np.full((8, 8), 30_000, np.int32)
    for name, values, sample_format, bits in (
        ("negative", bright - 30_005, 2, 16),
        ("positive", bright, 2, 16),
        ("byte", bright - 30_005, 2, 8),
    ):
        packed = values.astype(np.dtype(f"<i{bits // 8}")).tobytes()
        tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8)]
        tags += [(279, len(packed)), (339, sample_format)]
        at = (8 + len(packed)).to_bytes(4, "little")
        entries = b"".join(
            tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
            for tag, value in tags
        )
        end = len(tags).to_bytes(2, "little") + entries + bytes(4)
        (tmp_path / f"{name}.tif").write_bytes(b"II*\0" + at + packed + end)
    said = []
    dataset = load_dataset(str(tmp_path), warn=said.append)
    text = " ".join(said)
    assert len(dataset) == 2
    assert (dataset.images[1] == round(30_000 / 257)).all()
    assert "negative.tif (pixels of -5..-5: negative ones have no known range; convert" in text
    assert "byte.tif (signed pixels have no known range" in text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_every_mode_shows_the_same_picture(tmp_path, mode, suffix):
    picture = np.full((8, 8, 3), 255, np.uint8)
    picture[:, 4:] = 0  # white beside black: every mode has both
    image = Image.fromarray(picture).convert("P" if mode == "PA" else mode).convert(mode)
    for name in "ab":
        try:
            image.save(tmp_path / f"{name}.{suffix}")
        except OSError:
            pytest.skip(f"{suffix} has no mode {mode}")
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        grey = saved.mode in ("1", "L", "LA")
    dataset = load_dataset(str(tmp_path))
    assert dataset.shape == (8, 8, 1 if grey else 3)
    difference = dataset.images[0].astype(int) - picture[..., : dataset.shape[2]]
    assert np.abs(difference).max() <= (8 if suffix == "jpg" else 0)


def test_what_cannot_be_read_is_skipped_named_and_counted(tmp_path, rng, monkeypatch):
    images = rng.integers(0, 256, (12, 16, 16), dtype=np.uint8)
    for k in range(12):
        save_image(tmp_path / "ab"[k % 2] / f"{k:02}.png", images[k])
    whole = (tmp_path / "a/00.png").read_bytes()
    (tmp_path / "a/02.png").write_bytes(b"no image at all")  # no header
    (tmp_path / "b/03.png").unlink()
    (tmp_path / "b/03.png").symlink_to("nowhere.png")
    (tmp_path / "a/10.png").write_bytes(whole[:-60])  # a header, but not all pixels
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "b/float.tiff")
    said = []
    dataset = load_dataset(str(tmp_path), warn=said.append)
    kept = [0, 4, 6, 8, 1, 5, 7, 9, 11]
    assert np.array_equal(dataset.images[..., 0], images[kept])
    assert dataset.labels.tolist() == [0] * 4 + [1] * 5
    assert len(said) == 2
    assert "skipped 3 of 13 images" in said[0]
    for reason in ("02.png (not an image", "03.png (", "float.tiff (floating-point"):
        assert reason in said[0]
    assert "skipped 1 of 10 images" in said[1]
    assert "10.png (" in said[1]

    # Decoded when needed, the next of its class takes the place of the one that is cut off.
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    said.clear()
    dataset = load_dataset(str(tmp_path), warn=said.append)
    assert dataset.labels.tolist() == [0] * 5 + [1] * 5
    read = dataset.read(np.array([4, 9, 1, 4]))
    assert np.array_equal(read[..., 0], images[[0, 11, 4, 0]])
    assert len(said) == 2
    assert "10.png" in said[1]
    assert "another takes its place (1 so far)" in said[1]


def test_only_a_few_of_many_bad_images_are_named(tmp_path, rng):
    for k in range(9):
        (tmp_path / f"bad{k}.png").write_bytes(b"GIF89a" * k)
    with pytest.raises(UserError, match=r"none of 9 images can be read: .* and 6 more") as raised:
        load_dataset(str(tmp_path))
    assert str(raised.value).count("/bad") == 3
    save_image(tmp_path / "good.png", rng.integers(0, 256, (4, 4), dtype=np.uint8))
    with pytest.warns(UserWarning, match="skipped 9 of 10 images that cannot be read"):
        assert len(load_dataset(str(tmp_path))) == 1


def test_a_large_folder_of_which_nothing_can_be_decoded(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    for k in range(5):
        save_image(tmp_path / f"{k}.png", rng.integers(0, 256, (16, 16), dtype=np.uint8))
        content = (tmp_path / f"{k}.png").read_bytes()
        (tmp_path / f"{k}.png").write_bytes(content[:-60])
    said = []
    dataset = load_dataset(str(tmp_path), warn=said.append)
    with pytest.raises(RunError, match=r"none of 5 images can be read, such as .*2\.png"):
        dataset.read(np.array([2]))
    assert len(said) == 4  # the first three, and the fourth as a power of two
    assert "(4 so far)" in said[-1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_a_damaged_image_is_skipped_wherever_the_damage_is(tmp_path, rng, suffix):
    picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    picture.save(tmp_path / f"good.{suffix}")
    content = (tmp_path / f"good.{suffix}").read_bytes()
    unreadable = 0
    for k, position in enumerate(range(0, len(content), max(1, len(content) // 60))):
        damaged = content[:position] + bytes((content[position] ^ 0xFF,)) + content[position + 1 :]
        (tmp_path / f"k{k:03}.{suffix}").write_bytes(damaged)
    said = []
    dataset = load_dataset(str(tmp_path), image_size=9, warn=said.append)
    unreadable = sum(int(line.split("skipped ")[1].split()[0]) for line in said)
    assert len(dataset) + unreadable == k + 2
    assert unreadable >= 3


def test_bad_folders_are_named(tmp_path, rng):
    with pytest.raises(UserError, match="no images found"):
        load_dataset(str(tmp_path))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"none of 1 images can be read: .*gone\.png"):
        load_dataset(str(tmp_path))
    (tmp_path / "gone.png").unlink()
    save_image(tmp_path / "one.png", rng.integers(0, 256, (4, 4), dtype=np.uint8))
    with pytest.raises(UserError, match=r"give one of digits, fashion-mnist, cifar10"):
        load_dataset("digit")
    with pytest.raises(UserError, match="neither a folder"):
        load_dataset(str(tmp_path / "one.png"))
    with pytest.raises(UserError, match="digits has no test images"):
        load_dataset("digits", split="test")
