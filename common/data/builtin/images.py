"""`fashion-mnist-10k`, `fashion-mnist` and `digits`: small grey images in ten classes.

Pixels in 0..1 become `(pixel - CENTRE) / SCALE`, with round public figures near the mean and spread of such images.
"""

from __future__ import annotations

import gzip

import numpy as np
import numpy.typing as npt

from common.data.collection import Collection, Floats, as_examples
from common.data.fetch import unpacked
from common.data.pinned import parse_idx, vendored
from common.data.readers.optional import need
from common.schema import DataSchema

CENTRE, SCALE = 0.3, 0.35

CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FASHION = DataSchema(kind="image", input_shape=(1, 28, 28), num_classes=10, class_names=CLOTHES)
DIGITS = DataSchema(
    kind="image", input_shape=(1, 8, 8), num_classes=10, class_names=tuple(str(digit) for digit in range(10))
)


def load_fashion_10k() -> Collection:
    """The 10,000 images of Fashion-MNIST's test part: the first 8,000 to train on, the last 2,000 held out.

    Accuracies on it do not compare with published ones; those on `fashion-mnist` do.
    """
    images, labels = _test_files()
    return _collection(images, labels, schema=FASHION, train=8_000)


def load_fashion() -> Collection:
    """All 60,000 training images and the 10,000 test images, which are held out.

    Raises:
        DataUnavailableError: The training images have not been fetched.
    """
    images, labels = _test_files()
    train_images = parse_idx(unpacked("fashion-mnist", "train-images-idx3-ubyte.gz"))
    train_labels = parse_idx(unpacked("fashion-mnist", "train-labels-idx1-ubyte.gz"))
    return _collection(
        np.concatenate([train_images, images]), np.concatenate([train_labels, labels]), schema=FASHION, train=60_000
    )


def load_digits() -> Collection:
    """The 1,797 handwritten digits that come with scikit-learn; held-out examples are drawn by the seed.

    Raises:
        DataUnavailableError: scikit-learn is not installed.
    """
    found = need("sklearn.datasets", purpose="the data set digits").load_digits()
    return _collection(found.images / 16, found.target, schema=DIGITS, train=None)


def _test_files() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images and labels of Fashion-MNIST's test part."""
    images, labels = (vendored(f"t10k-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    return parse_idx(gzip.decompress(images)), parse_idx(gzip.decompress(labels))


def _scaled(pixels: npt.NDArray[np.generic]) -> Floats:
    """float32[n, 1, height, width] from bytes, or from numbers in 0..1."""
    unit = pixels[:, None].astype(np.float32)
    if pixels.dtype == np.uint8:
        unit /= 255
    unit -= CENTRE
    unit /= SCALE
    return unit


def _collection(
    pixels: npt.NDArray[np.generic], labels: npt.NDArray[np.generic], *, schema: DataSchema, train: int | None
) -> Collection:
    """Images of which those from index `train` on are held out."""
    n = len(labels)
    return Collection(
        schema=schema,
        examples=as_examples(_scaled(pixels), labels),
        row_ids=[str(i) for i in range(n)],
        held_out=None if train is None else np.arange(n) >= train,
        rows=n,
    )
