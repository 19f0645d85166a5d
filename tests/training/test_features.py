"""Features for a Frechet distance: the classifier's file, Inception, parts of a dataset."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.evaluation import features
from fastdiff.training import UserError, data, load_dataset


def test_a_classifier_with_another_purpose_is_refused(tmp_path):
    images = load_dataset("digits")
    path = tmp_path / "features.safetensors"
    for content in (None, b"no safetensors"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"features\.safetensors holds no classifier"):
            features.extractor(str(path), images, "digits", tmp_path, torch.device("cpu"), print)
    features._save_classifier(
        path, features.FeatureClassifier(3, 2), {"shape": [8, 8, 3], "num_classes": 2}
    )
    with pytest.raises(UserError, match=r"for images of 3 channels, --data digits has 1"):
        features.extractor(str(path), images, "digits", tmp_path, torch.device("cpu"), print)


def test_large_images_are_averaged_for_the_classifier():
    classifier = features.FeatureClassifier(1, 2).eval()
    small = torch.randint(256, (2, 1, 64, 48), dtype=torch.uint8)
    large = small.repeat_interleave(2, 2)
    with torch.no_grad():
        torch.testing.assert_close(classifier.features(large), classifier.features(small))


def test_inception_needs_its_weights(tmp_path, monkeypatch):
    images = load_dataset("digits")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    arguments = ("inception", images, "digits", tmp_path, torch.device("cpu"), print)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match="needs torchvision; install it with"):
        features.extractor(*arguments)
    monkeypatch.undo()
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"its weights are not there; fetch https://.*\.pth to"):
        features.extractor(*arguments)
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / "inception_v3_google-0cc3c7bd.pth").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"--features inception: cannot read .*0cc3c7bd"):
        features.extractor(*arguments)


@pytest.mark.slow
def test_inception_gives_its_2048_features(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = models.inception_v3(weights=None, init_weights=False)
    torch.save(net.state_dict(), folder / "inception_v3_google-0cc3c7bd.pth")
    images = load_dataset("digits")
    extract = features.extractor(
        "inception", images, "digits", tmp_path, torch.device("cpu"), print
    )
    found = extract.of_dataset(images, np.arange(3), "cpu")
    seen = []
    net.eval().avgpool.register_forward_hook(lambda *args: seen.append(args[2]))
    transform = models.Inception_V3_Weights.IMAGENET1K_V1.transforms()
    transform.crop_size = transform.resize_size = [299]
    with torch.no_grad():
        pixels = torch.from_numpy(images.images[:3]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        net(transform(pixels))
    expected = seen[0].flatten(1).double().numpy()
    assert found.shape == (3, 2048)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def mean_and_spread(levels):
    pixels = levels.double().flatten(1) / 255
    return torch.stack((pixels.mean(1), pixels.std(1)), 1).numpy()


def test_folder_of_images_is_read_part_by_part(tmp_path, monkeypatch):
    images = load_dataset("digits").images[:23]
    for k, pixels in enumerate(images):
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"{k:02}.png")
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(features, "_PART", 10)
    extract = features.Extractor("own", mean_and_spread, {})
    found = extract.of_dataset(load_dataset(str(tmp_path)), np.arange(23)[::-1], "cpu")
    expected = mean_and_spread(torch.from_numpy(images[::-1].copy()).permute(0, 3, 1, 2))
    assert np.array_equal(found, expected)
