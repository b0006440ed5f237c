"""Scenarios whose envelope opens and whose ciphertext is refused."""

from tests.common.crypto import reference as ref
from tests.common.crypto.scenarios import KEY, SEALED_CHUNK, TEXT, honest, large, model, refuse, scenario


@scenario
def blob_missing(p):
    """The ciphertext is empty."""
    case = honest(p)
    case.blob = b""
    return refuse(case, "blob", "truncated")


@scenario
def blob_truncated(p):
    """The last byte of the ciphertext is missing."""
    case = honest(p)
    case.blob = case.blob[:-1]
    return refuse(case, "blob", "truncated")


@scenario
def blob_truncated_between_chunks(p):
    """The last chunk is missing."""
    return large(p, [(0, 2 * SEALED_CHUNK)], layer="truncated")


@scenario
def blob_trailing_byte(p):
    """A byte follows the last chunk."""
    case = honest(p)
    case.blob += b"\0"
    return refuse(case, "blob", "length")


@scenario
def blob_trailing_chunk(p):
    """The last chunk comes twice."""
    end = 2 * SEALED_CHUNK + 21
    return large(p, [(0, end), (end - 21, end)], layer="length")


@scenario
def chunks_reordered(p):
    """The first two chunks have changed places."""
    end = 2 * SEALED_CHUNK + 21
    return large(p, [(SEALED_CHUNK, 2 * SEALED_CHUNK), (0, SEALED_CHUNK), (2 * SEALED_CHUNK, end)])


@scenario
def chunk_repeated(p):
    """The first chunk stands in the place of the second."""
    return large(p, [(0, SEALED_CHUNK), (0, SEALED_CHUNK), (2 * SEALED_CHUNK, 2 * SEALED_CHUNK + 21)])


@scenario
def bit_of_a_later_chunk(p):
    """One bit of the second chunk is changed: the first, which verifies, may not be used either."""
    return large(p, [(0, 2 * SEALED_CHUNK + 21)], flips=[SEALED_CHUNK + 7], broadcast=False)


@scenario
def bit_of_a_chunk(p):
    """One bit of the ciphertext is changed."""
    case = honest(p)
    case.blob = ref.flip(case.blob, 0)
    return refuse(case, "blob", "chunk")


@scenario
def bit_of_a_tag(p):
    """One bit of the only chunk's tag is changed."""
    case = honest(p)
    case.blob = ref.flip(case.blob, -1)
    return refuse(case, "blob", "chunk")


@scenario
def last_chunk_not_marked(p):
    """The only chunk was encrypted as if another followed."""
    case = honest(p)
    case.blob = ref.encrypt(KEY, case.envelope[: ref.HEADER], b"".join([TEXT[0]] * TEXT[1]), ends=False)
    return refuse(case, "blob", "chunk")


@scenario
def blob_of_another_message(p):
    """The ciphertext of the same sender's message of another round, under the same content key."""
    case, other = honest(p), honest(p, server_round=4)
    case.blob = other.blob
    return refuse(case, "blob", "chunk")


@scenario
def forged_by_another_recipient(p):
    """Site-b, a recipient too, knows the content key: it encrypts a model of its own under the coordinator's envelope
    for site-a. Every chunk verifies; the digest that the coordinator signed does not.
    """
    case = model(p, broadcast=True)
    evil = b"a forged model's weights, as long as the honest ones".ljust(95, b".")
    case.blob = ref.encrypt(KEY, case.envelope[: ref.HEADER], evil)
    return refuse(case, "blob", "digest")
