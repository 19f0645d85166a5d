"""Writes datasets in the formats they are published in."""

import gzip
import pickle

import numpy as np

TRAINING_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def idx_bytes(array: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes((0, 0, 8, array.ndim)) + lengths + array.tobytes()


def write_idx(folder, images, labels, suffix="", prefix="train"):
    pack = gzip.compress if suffix else bytes
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))


def write_cifar10(folder, names, planes, labels, layout):
    """Files of len(planes) / len(names) images each."""
    for name, pixels, classes in zip(
        names,
        np.array_split(planes.reshape(-1, 3072), len(names)),
        np.array_split(labels, len(names)),
        strict=True,
    ):
        if layout == "python":
            # Bytes keys, as Python 2 wrote them.
            batch = {b"data": pixels, b"labels": classes.tolist(), b"batch_label": b"x"}
            (folder / name).write_bytes(_python2_pickle(batch))
        else:
            records = np.column_stack((classes.astype(np.uint8), pixels))
            (folder / f"{name}.bin").write_bytes(records.tobytes())


def _python2_pickle(batch) -> bytes:
    """Pickle as CIFAR-10's files are: NumPy's old module name, arrays as raw bytes."""
    return pickle.dumps(batch, protocol=3).replace(b"numpy._core.multi", b"numpy.core.multi")
