"""Records bound to one another by their hashes."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LedgerError
from common.privacy.ledger.chain import START, Chain, line_after, read_chain


def chained(count: int) -> bytes:
    data = b""
    for i in range(count):
        data += line_after(read_chain(data), {"value": i})
    return data


class TestReading:
    """What `read_chain` makes of a file."""

    def test_lines_are_linked_by_the_hash_of_the_line_before(self):
        """Over its bytes as they are in the file."""
        first, second = chained(2).splitlines()
        assert json.loads(first) == {"value": 0, "number": 0, "previous": START}
        assert json.loads(second)["previous"] == hashlib.sha256(first).hexdigest()

    def test_a_sound_file_is_read_to_its_end(self):
        """Its head is the hash of its last line, its size that of the file."""
        data = chained(3)
        chain = read_chain(data)
        assert [record["value"] for record in chain.records] == [0, 1, 2]
        assert (chain.size, chain.tail, chain.problem) == (len(data), b"", "")
        assert chain.head == hashlib.sha256(data.splitlines()[-1]).hexdigest()

    @given(st.integers(0, 5), st.integers(0, 5))
    def test_reading_on_is_reading_anew(self, before, more):
        """Whatever was read before."""
        data = chained(before + more)
        start = len(chained(before))
        assert read_chain(data[start:], read_chain(data[:start])) == read_chain(data)

    @given(st.data())
    def test_no_line_changes_moves_or_goes_unseen(self, data):
        """Any other byte, any two lines exchanged, any line left out but the last, stops the reading there."""
        lines = chained(4).splitlines(keepends=True)
        at = data.draw(st.integers(0, 2))
        how = data.draw(st.sampled_from(["change", "swap", "drop", "repeat"]))
        if how == "change":
            place = data.draw(st.integers(0, len(lines[at]) - 1))
            byte = data.draw(st.integers(0, 255).filter(lambda b: b != lines[at][place]))
            lines[at] = lines[at][:place] + bytes([byte]) + lines[at][place + 1 :]
        elif how == "swap":
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        elif how == "drop":
            del lines[at]
        else:
            lines.insert(at, lines[at])
        chain = read_chain(b"".join(lines))
        assert chain.problem
        assert len(chain.records) <= at + 1

    @given(st.binary(max_size=200))
    def test_no_bytes_raise_an_error(self, data):
        """After any sound start."""
        for start in (b"", chained(2)):
            chain = read_chain(start + data)
            assert chain.problem or chain.size + len(chain.tail) == len(start + data)

    @pytest.mark.parametrize("line", [b"[" * 100_000, b"null", b"[]", b'"x"', b"1e999", b"\xff\xfe", b"\x00" * 9, b""])
    def test_what_is_no_record_is_told(self, line):
        """With the number of its line."""
        assert read_chain(chained(1) + line + b"\n").problem.startswith("line 2: ")

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_line_that_was_never_finished_is_the_tail(self, cut):
        """It is no record, and no problem by itself."""
        data = chained(3)
        chain = read_chain(data[:-cut])
        assert len(chain.records) == 2
        assert data[:-cut].endswith(chain.tail)
        assert chain.tail
        assert chain.problem == ""

    def test_whoever_reads_the_records_can_stop_the_reading(self):
        """What is not understood ends the chain before it."""

        def take(record):
            if record["value"] == 1:
                raise LedgerError("no")

        assert read_chain(chained(3), take=take) == Chain(
            tuple(read_chain(chained(1)).records), len(chained(1)), read_chain(chained(1)).head, problem="line 2: no"
        )

    def test_what_is_not_finite_cannot_be_written(self):
        """JSON has no such numbers."""
        with pytest.raises(ValueError, match="Out of range"):
            line_after(Chain(), {"value": float("inf")})
