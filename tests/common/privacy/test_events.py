"""What an event says of a release, and how it is written down."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import LedgerError
from common.privacy.events import VERSION, DistributedNoise, event_from_dict, event_to_dict
from tests.helpers.events import matrix, non_private, sampled, shared

EVERY_KIND = [
    sampled(3, count_noise_stddev=2.5, distance=1e-12),
    matrix(),
    shared(2),
    shared(2, mechanism="discrete-gaussian"),
    non_private(),
]

BEFORE = [
    (
        sampled(3, noise=5.0, rate=0.25, distance=1e-30),
        (
            '{"clipping_norm":1.0,"count_noise_stddev":null,"distance":1e-30,"kind":"sampled-gaussian","noise_stddev":5.0,'
            '"run":"r","sampling_rate":0.25,"sensitivity":1.0,"server_round":3,"steps":1,"trust":"nobody","unit":"example",'
            '"version":2}'
        ),
    ),
    (
        matrix(unit="client", trust="coordinator"),
        (
            '{"clipping_norm":1.0,"distance":0.0,"kind":"matrix-gaussian","min_separation":5,"noise_stddev":2.0,'
            '"participations":2,"rounds":10,"run":"r","sensitivity":1.0,"server_round":1,"trust":"coordinator",'
            '"unit":"client","version":2}'
        ),
    ),
    (non_private(), '{"kind":"non-private","run":"r","server_round":1,"version":2}'),
]
"""As ledgers hold them that were written before there was distributed noise."""


class TestOnPaper:
    """Events as JSON."""

    @pytest.mark.parametrize("event", EVERY_KIND, ids=lambda event: event.KIND)
    def test_what_is_written_is_read(self, event):
        """Through text."""
        assert event_from_dict(json.loads(json.dumps(event_to_dict(event)))) == event

    @pytest.mark.parametrize(("event", "text"), BEFORE, ids=lambda value: getattr(value, "KIND", ""))
    def test_what_was_written_before_is_still_read(self, event, text):
        """To the last field, and written the same today."""
        assert event_from_dict(json.loads(text)) == event
        assert json.dumps(event_to_dict(event), sort_keys=True, separators=(",", ":")) == text

    @pytest.mark.parametrize(
        "change",
        [{"kind": "shared-noise"}, {"version": VERSION + 1}, {"version": 1}, {"more": 1}, {"mechanism": "laplace"}],
        ids=str,
    )
    def test_what_is_not_understood_is_refused(self, change):
        """Never skipped: it could not be counted."""
        with pytest.raises(LedgerError):
            event_from_dict(event_to_dict(shared()) | change)

    @pytest.mark.parametrize("field", [name for name in event_to_dict(shared()) if name != "unit"])
    @given(
        value=st.none() | st.booleans() | st.text(max_size=3) | st.just(-1) | st.just(math.nan) | st.lists(st.none())
    )
    @settings(deadline=None, max_examples=10)
    def test_no_field_may_be_of_another_kind(self, field, value):
        """A run's name is a text; everything else is a number of its kind."""
        record = event_to_dict(shared()) | {field: value}
        if field == "run" and isinstance(value, str):
            assert event_from_dict(record) == shared(run=value)
            return
        with pytest.raises(LedgerError):
            event_from_dict(record)


class TestDistributedNoise:
    """A sum to which its clients added the noise."""

    def test_its_multiplier_is_that_of_the_honest_shares(self):
        """Over the rounded sensitivity, in steps of the grid."""
        event = shared(l2_squared=400, variance=10_000)
        assert event.noise_multiplier == 5

    @pytest.mark.parametrize(
        "fields",
        [
            {"unit": "example"}, {"trust": "nobody"}, {"trust": "coordinator"}, {"mechanism": "gaussian"},
            {"clipping_norm": 0.0}, {"granularity": -1.0}, {"granularity": math.inf}, {"l2_squared": 0},
            {"l2_squared": 1e6}, {"l1": 0}, {"variance": 0}, {"variance": 1.5},
            {"variance": 1 << 101}, {"shares": 0}, {"colluding": -1}, {"colluding": 0.5}, {"dimensions": 0},
            {"steps": 0}, {"distance": 1.0}, {"distance": -1e-9}, {"server_round": 0}, {"run": None},
        ],
        ids=str,
    )  # fmt: skip
    def test_impossible_values_are_refused(self, fields):
        """Before they are written, and when they are read."""
        with pytest.raises(LedgerError):
            replace(shared(), **fields).check()

    @given(st.floats(1e-3, 1e3), st.integers(1, 10**12))
    @settings(deadline=None)
    def test_its_sensitivity_covers_its_clipping_norm(self, norm, l2_squared):
        """A grid that is finer than the sensitivity says would be more noise on paper than there is."""
        event = shared(clipping_norm=norm, l2_squared=l2_squared, granularity=norm / math.sqrt(l2_squared))
        event.check()
        with pytest.raises(LedgerError):
            replace(event, granularity=event.granularity / 1.5).check()
        with pytest.raises(LedgerError):
            replace(event, l1=max(1, math.isqrt(l2_squared) // 2), l2_squared=l2_squared + 9).check()

    def test_no_site_may_collude_or_many(self):
        """How many may is for the site's policy to say."""
        for colluding in (0, 1, 50):
            shared(colluding=colluding).check()
        assert DistributedNoise.KIND == "distributed-noise"
