"""Reading traces: what one says, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, RunError
from simulations.clock import check_clients, read_trace, trace_digest
from simulations.clock.presence import Always

WHOLE = {
    "client": "a",
    "examples_per_second": 120,
    "download_mbit": 20,
    "upload_mbit": 5.5,
    "dropout": 0.25,
    "available": [[0, 10], [20, 30]],
    "period": 40,
}
SPEED = {"examples_per_second": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


class TestGood:
    """What a trace says."""

    def test_all_that_a_line_says(self, path: Path) -> None:
        """Speeds, bandwidths, dropout, spells and whose device it is."""
        devices = read_trace(write(path, WHOLE))
        one = devices.of(5, "a")
        assert (one.examples_per_second, one.download_mbit, one.upload_mbit, one.dropout) == (120, 20, 5.5, 0.25)
        assert [one.presence.ends(at) for at in (5, 15, 65)] == [10, None, 70]

    def test_a_speed_is_enough(self, path: Path) -> None:
        """Such a device is always there, never drops out, and transfers take it no time."""
        one = read_trace(write(path, SPEED)).of(0, "any")
        assert (one.download_mbit, one.upload_mbit, one.dropout, one.presence) == (math.inf, math.inf, 0, Always())

    def test_spells_that_touch_are_one(self, path: Path) -> None:
        """A device does not go away between them."""
        devices = read_trace(write(path, {**SPEED, "available": [[0, 10], [10, 30]], "period": 40}))
        assert devices.of(0, "x").presence.ends(5) == 30

    def test_the_last_line_needs_no_end(self, path: Path) -> None:
        """A file may end without a newline."""
        path.write_text('{"examples_per_second": 1}\n{"examples_per_second": 2}')
        assert len(read_trace(path).lines) == 2

    def test_it_travels_to_other_processes(self, path: Path) -> None:
        """Which have to know how many steps their clients take."""
        devices = read_trace(write(path, WHOLE))
        copied = pickle.loads(pickle.dumps(devices))  # noqa: S301 - our own
        assert copied.of(0, "a").examples_per_second == 120
        assert [copied.of(0, "a").presence.ends(at) for at in (5, 15, 65)] == [10, None, 70]

    def test_its_digest_is_that_of_its_bytes(self, path: Path) -> None:
        """SHA-256, in hexadecimal."""
        assert trace_digest(write(path, SPEED)) == hashlib.sha256(path.read_bytes()).hexdigest()


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "JSON"),
    "not UTF-8": ("\udcff", "JSON"),
    "no object": ([1], "object"),
    "nested beyond reason": ("[" * 100_000, "JSON"),
    "a key twice": ('{"examples_per_second": 1, "examples_per_second": 2}', "twice"),
    "a key that is not known": ({**SPEED, "speed": 1}, "`speed`"),
    "no speed": ({"dropout": 0.1}, "`examples_per_second` is missing"),
    "a negative speed": ({"examples_per_second": -1}, "-1"),
    "a speed of zero": ({"examples_per_second": 0}, "more than 0"),
    "a speed that is not a number": ('{"examples_per_second": NaN}', "JSON"),
    "an infinite speed": ('{"examples_per_second": Infinity}', "JSON"),
    "a speed beyond all floats": ('{"examples_per_second": 1e999}', "finite"),
    "a whole speed beyond all floats": ({"examples_per_second": 10**400}, "finite"),
    "a speed that is text": ({"examples_per_second": "1"}, "finite"),
    "a speed that is a truth": ({"examples_per_second": True}, "finite"),
    "no speed but nothing": ({"examples_per_second": None}, "finite"),
    "a negative download": ({**SPEED, "download_mbit": -3}, "`download_mbit` is -3"),
    "a download of zero": ({**SPEED, "download_mbit": 0}, "without `download_mbit`"),
    "an upload of zero": ({**SPEED, "upload_mbit": 0}, "without `upload_mbit`"),
    "a negative dropout": ({**SPEED, "dropout": -0.1}, "probability"),
    "a certain dropout": ({**SPEED, "dropout": 1}, "probability"),
    "a client without a name": ({**SPEED, "client": ""}, "`client`"),
    "a client that is a number": ({**SPEED, "client": 3}, "`client`"),
    "spells without a period": ({**SPEED, "available": [[0, 1]]}, "`period` is missing"),
    "a period without spells": ({**SPEED, "period": 5}, "`available` is missing"),
    "a period of zero": ({**SPEED, "available": [[0, 1]], "period": 0}, "`period` is 0"),
    "no spell": ({**SPEED, "available": [], "period": 5}, "no spell"),
    "spells that are no list": ({**SPEED, "available": 3, "period": 5}, "no spell"),
    "a spell of three moments": ({**SPEED, "available": [[0, 1, 2]], "period": 5}, "[start, end]"),
    "a spell that is text": ({**SPEED, "available": ["ab"], "period": 5}, "[start, end]"),
    "a spell before the period": ({**SPEED, "available": [[-1, 1]], "period": 5}, "within the period"),
    "a spell beyond the period": ({**SPEED, "available": [[0, 6]], "period": 5}, "within the period"),
    "a spell that ends before it begins": ({**SPEED, "available": [[3, 2]], "period": 5}, "within the period"),
    "an empty spell": ({**SPEED, "available": [[2, 2]], "period": 5}, "within the period"),
    "spells over each other": ({**SPEED, "available": [[0, 3], [2, 4]], "period": 5}, "before the one before"),
    "spells that descend": ({**SPEED, "available": [[3, 4], [0, 1]], "period": 5}, "before the one before"),
    "a moment that is not a number": ({**SPEED, "available": [[0, "x"]], "period": 5}, "finite"),
}


class TestBad:
    """A trace that is wrong is refused, and the error says where and what."""

    @pytest.mark.parametrize("case", BAD)
    def test_a_line_with(self, path: Path, case: str) -> None:
        """File, line and fault are named, and how to mend it."""
        line, what = BAD[case]
        text = line if isinstance(line, str) else json.dumps(line)
        good = {key: WHOLE[key] for key in WHOLE if isinstance(line, dict) and key in line} | SPEED
        good |= {"client": "other"} if "client" in good else {}
        if not {"available", "period"} <= good.keys():
            good = {key: good[key] for key in good if key not in {"available", "period"}}
        path.write_bytes(f"{json.dumps(good)}\n{text}\n".encode(errors="surrogateescape"))
        with pytest.raises(ConfigError) as error:
            read_trace(path)
        assert f"{path}, line 2:" in str(error.value)
        assert what in f"{error.value} {error.value.hint}"
        assert error.value.hint

    @pytest.mark.parametrize("key", ["client", "download_mbit", "upload_mbit", "dropout", "available"])
    def test_a_gap(self, path: Path, key: str) -> None:
        """What the first line says and another does not is missing there, and the other way round is too much."""
        gap = {k: v for k, v in WHOLE.items() if k not in ({key, "period"} if key == "available" else {key})}
        whole = {**WHOLE, "client": "b"}
        with pytest.raises(ConfigError, match=rf"line 3: `{key}` is missing, which line 1 has"):
            read_trace(write(path, WHOLE, whole, gap))
        with pytest.raises(ConfigError, match=rf"line 2: `{key}` is there, which line 1 does not have"):
            read_trace(write(path, gap, whole))

    def test_an_empty_line_is_a_gap(self, path: Path) -> None:
        """It is not passed over."""
        with pytest.raises(ConfigError, match="line 2: it is empty"):
            read_trace(write(path, SPEED, "", SPEED))

    def test_an_empty_file(self, path: Path) -> None:
        """There has to be a device."""
        path.touch()
        with pytest.raises(ConfigError, match="is empty"):
            read_trace(path)

    def test_no_file(self, path: Path) -> None:
        """It cannot be read, and neither can a folder."""
        for read in (read_trace, trace_digest):
            with pytest.raises(RunError, match="cannot be read"):
                read(path)
            with pytest.raises(RunError, match="cannot be read"):
                read(path.parent)

    def test_a_client_twice(self, path: Path) -> None:
        """One device a client."""
        with pytest.raises(ConfigError, match="line 2: client a is there twice"):
            read_trace(write(path, WHOLE, WHOLE))

    def test_a_client_of_the_run_that_the_trace_does_not_name(self, path: Path) -> None:
        """It is named; clients of the trace that are not in the run do not matter."""
        devices = read_trace(write(path, WHOLE))
        with pytest.raises(ConfigError, match=r"trace\.jsonl has no device for client b"):
            check_clients(path, devices, ["a", "b"])
        check_clients(path, devices, ["a"])
        check_clients(path, devices, [])

    def test_a_trace_without_names_fits_every_run(self, path: Path) -> None:
        """Its lines are dealt."""
        check_clients(path, read_trace(write(path, SPEED)), ["a", "b"])

    @settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=60) | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(WHOLE)), inner, max_size=7),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()))  # fmt: skip
    def test_nothing_else_than_an_error_comes_of_any_bytes(self, path: Path, data: bytes) -> None:
        """No bytes end in a traceback."""
        path.write_bytes(data)
        with suppress(ConfigError):
            read_trace(path)
