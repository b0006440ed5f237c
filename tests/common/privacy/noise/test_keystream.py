"""Random bits from a stream cipher."""

import copy
import pickle
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import PrivacyError
from common.privacy.noise import keystream
from common.privacy.noise.keystream import KEY_BYTES, SPARE_WORDS, Keystream

KEY = bytes(range(32))


def test_it_is_aes_256_in_counter_mode():
    """The words are the encryption of zeros from counter 0 on, in the order of memory."""
    expected = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 1000))
    assert Keystream(KEY).words(1000).tobytes() == expected


def test_its_parts_follow_one_another(monkeypatch):
    """However it is asked for, and however large the blocks that the cipher is given."""
    monkeypatch.setattr(keystream, "_ZEROS", memoryview(bytes(64)))
    stream = Keystream(KEY)
    parts = [stream.words(count) for count in (0, 1, 8, 9, 100, 3)]
    monkeypatch.undo()
    assert np.array_equal(np.concatenate(parts), Keystream(KEY).words(121))


def test_it_fills_a_buffer_in_place():
    """No more than the words asked for are taken from the stream, and none is written beyond the spare ones."""
    stream, room = Keystream(KEY), np.full(20, 7, dtype=np.uint64)
    words = stream.fill(room, 5)
    assert np.shares_memory(words, room)
    assert (room[5 + SPARE_WORDS :] == 7).all()
    assert np.array_equal(np.concatenate((words, stream.words(5))), Keystream(KEY).words(10))


@pytest.mark.parametrize("size", [0, 16, KEY_BYTES - 1, KEY_BYTES + 1])
def test_a_key_of_another_length_is_refused(size):
    """A shorter one would still be a valid key of AES."""
    with pytest.raises(PrivacyError):
        Keystream(bytes(size))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied_or_sent(duplicate):
    """Two holders of one key would draw the same bits."""
    with pytest.raises(TypeError):
        duplicate(Keystream(KEY))


def test_its_text_does_not_show_the_key():
    """A log line of it says nothing."""
    assert repr(Keystream(KEY)) == str(Keystream(KEY)) == "Keystream()"


def test_another_process_is_refused(monkeypatch):
    """Before anything is drawn."""
    stream = Keystream(KEY)
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        with pytest.raises(PrivacyError, match="fork"):
            stream.words(1)
    assert stream.words(1) == Keystream(KEY).words(1)


@pytest.mark.skipif(sys.byteorder != "little", reason="words are in the order of memory")
def test_a_known_answer():
    """AES-256 of the block of zeros under this key, as OpenSSL's command line gives it: aes-256-ctr with a zero IV."""
    assert [f"{word:016x}" for word in Keystream(KEY).words(2).tolist()] == ["d09f492ab60090f2", "80772edd6a9af3a9"]
