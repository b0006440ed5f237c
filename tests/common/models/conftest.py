"""One small data description of each kind."""

import pytest

from common.schema import DataSchema


@pytest.fixture
def image() -> DataSchema:
    return DataSchema(kind="image", input_shape=(1, 12, 14), num_classes=3)


@pytest.fixture
def tabular() -> DataSchema:
    return DataSchema(kind="tabular", input_shape=(6,), num_classes=2)


@pytest.fixture
def text() -> DataSchema:
    return DataSchema(kind="tokens", input_shape=(7,), num_classes=3, vocabulary_size=11)


@pytest.fixture
def next_token() -> DataSchema:
    return DataSchema(kind="tokens", input_shape=(7,), num_classes=11, vocabulary_size=11, per_position=True)
