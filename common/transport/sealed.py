"""What a sealed message is to Flower: an envelope for one recipient and a blob of ciphertext, nothing else in clear."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.errors import RefusedError
from common.flower import COHORT
from common.transport.records import decode_records, manifest

SEALED, ENVELOPE, BLOB = "sealed", "envelope", "blob"
"""Records of a sealed message: `sealed` holds the envelope, `blob` the ciphertext."""

LARGEST_ENVELOPE: Final = 64 << 10
"""Bytes; the longest that exists is some kilobytes. A longer one is refused before anything reads it."""

Bytes = bytes | bytearray | memoryview


ORDER_BYTES: Final = 16


def order_id(envelope: bytes) -> bytes:
    """16 bytes by which everybody names one order: a request to one site.

    All recipients of a broadcast share its header and so its message id; the envelope is each one's own, and no two are
    alike. An update says in its header's `reply_to` which order it answers.
    """
    return hashlib.sha256(envelope).digest()[:ORDER_BYTES]


NO_DIGEST: Final = bytes(32)


def most_reply_bytes(request_bytes: int) -> int:
    """How long the plaintext of an answer may be: float64 for float32, and metrics. Who carries it holds it to the same
    bound as who opens it.
    """
    return 4 * request_bytes + (1 << 20)


def cohort_digest(config: Mapping[str, Any]) -> bytes:
    """SHA-256 over the sorted names of the cohort that a request lists; zeros where it lists none.

    Raises:
        RefusedError: What it says is not a list of names.
    """
    text = config.get(COHORT)
    if text is None:
        return NO_DIGEST
    try:
        names = json.loads(text)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(COHORT)
    except (TypeError, ValueError, RecursionError) as e:
        raise RefusedError("the cohort of a request cannot be read", hint="both sides must run the same version") from e
    return hashlib.sha256("\n".join(sorted(names)).encode()).digest()


class Blob(Array):
    """Ciphertext as a Flower `Array` (uint8[size]), held in memory or as a file that somebody else removes.

    Flower's own engines and other processes get it as a plain `Array`; `read_sealed` makes a blob of that again.
    """

    def __init__(self, held: Bytes | Path, size: int) -> None:
        fields = self.__dict__
        fields["dtype"], fields["shape"], fields["stype"] = "uint8", (size,), "numpy.ndarray"
        fields["_held"] = held

    @classmethod
    def of_bytes(cls, data: Bytes) -> Self:
        """A blob in memory; `data` must not change."""
        return cls(data, memoryview(data).nbytes)

    @classmethod
    def of_file(cls, path: Path, size: int) -> Self:
        """A blob in a file, which must stay as long as the blob is read."""
        return cls(path, size)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape[0]

    @property
    def path(self) -> Path | None:
        """The file, if the blob is one."""
        held = self.__dict__["_held"]
        return held if isinstance(held, Path) else None

    def open(self) -> BinaryIO:
        """The bytes from the start, to be read once and closed."""
        held: Path | Bytes = self.__dict__["_held"]
        if isinstance(held, Path):
            return held.open("rb")
        return BytesIO(held) if isinstance(held, bytes) else cast("BinaryIO", _Reader(memoryview(held).cast("B")))

    def numpy(self) -> NDArray[Any]:
        """The bytes as uint8[size], not a copy where it can be avoided; not to be written to."""
        held: Path | Bytes = self.__dict__["_held"]
        if isinstance(held, Path):
            return np.memmap(held, dtype=np.uint8, mode="r", shape=self.shape) if self.size else np.zeros(0, np.uint8)
        return np.frombuffer(held, dtype=np.uint8)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in npy format, as Flower's own engines send it."""
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Travels between Flower's own processes as a plain `Array`."""
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def __repr__(self) -> str:
        """Size and place, not the bytes."""
        return f"Blob({self.size} bytes{f' in {self.path}' if self.path else ''})"


def sealed_content(envelope: bytes, blob: Blob) -> RecordDict:
    """The content of a sealed message."""
    record = ArrayRecord()
    record[BLOB] = blob
    return RecordDict({SEALED: ConfigRecord({ENVELOPE: envelope}), BLOB: record})


def read_sealed(content: RecordDict) -> tuple[bytes, Blob]:
    """Envelope and blob of a sealed message. Nothing about them has been verified.

    Guarantee: nothing is copied, and nothing is allocated by what the bytes claim to be.

    Raises:
        RefusedError: The content is not that of a sealed message, or holds anything beside it.
    """
    try:
        sealed, record = content[SEALED], content[BLOB]
        if len(content) != 2 or not isinstance(sealed, ConfigRecord) or not isinstance(record, ArrayRecord):
            raise TypeError(content)
        envelope, array = _only(sealed, ENVELOPE), _only(record, BLOB)
        if not isinstance(envelope, bytes) or len(envelope) > LARGEST_ENVELOPE:
            raise TypeError(ENVELOPE)
        return envelope, array if isinstance(array, Blob) else _blob(array)
    except (KeyError, TypeError, ValueError, EOFError) as e:
        raise RefusedError("the message is not sealed", hint="both sides must run the same version") from e


def read_records(
    read: Callable[[BinaryIO, memoryview], None], blob: Blob, *, blob_bytes: int, plaintext_bytes: int, digest: bytes
) -> RecordDict:
    """The records in a sealed message.

    Args:
        read: Decrypts a source into a buffer, or raises RefusedError.
        blob: The ciphertext that came.
        blob_bytes: How long it must be; looked at before anything is allocated.
        plaintext_bytes: How long the records are.
        digest: What `manifest` says of them.

    Raises:
        RefusedError: Anything of it does not fit.
        OSError: The blob cannot be read.
    """
    misfit = RefusedError("a sealed message does not fit its envelope", hint="both sides must run the same version")
    if blob.size != blob_bytes or not plaintext_bytes:
        raise misfit
    plain = np.empty(plaintext_bytes, np.uint8).data
    with blob.open() as source:
        read(source, plain)
    records = decode_records(plain)
    if manifest(records) != digest:
        raise misfit
    return records


def _only(record: Mapping[str, Any], key: str) -> Any:
    """The value of a record that has no other."""
    if len(record) != 1:
        raise KeyError(key)
    return record[key]


def _blob(array: Array) -> Blob:
    """A blob over an array that came: ours as it was decoded, or Flower's in npy format."""
    if type(array) is not Array:
        values = array.numpy()
        if values.dtype != np.uint8 or values.ndim != 1 or not values.flags.c_contiguous:
            raise ValueError(values.dtype)
        return Blob.of_bytes(values.data)
    if array.stype != "numpy.ndarray":
        raise ValueError(array.stype)
    # `np.load` would allocate what the header claims; here it has to describe exactly the bytes that are there.
    stream = BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    body = memoryview(array.data)[stream.tell() :]
    if dtype != np.uint8 or shape != (len(body),):
        raise ValueError(dtype)
    return Blob.of_bytes(body)


class _Reader(io.RawIOBase):
    """Reads a buffer without copying it first."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As much as there is and fits."""
        target = memoryview(buffer).cast("B")
        part = self._view[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)
