"""Sentences, numbers and drawings, each by itself."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import FailureCode
from common.guarantee import UPDATE_REPLACED
from server.report.privacy import _meaning
from server.report.record import PrivacyResult, SharesResult
from server.report.svg import MAX_POINTS, Plot, padded, tag, thin, ticks
from server.report.words import ceiling, count, duration, failure_sentence, joined, number, percent, points, quantiles


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "\u2013"), (0.0, "0"), (3.0, "3"), (2.9712, "2.97"), (28938, "28\u202f938"), (1e-5, "1e-5"),
        (2.5e-7, "2.5e-7"), (12345.6, "12346"), (math.inf, "∞"), (-math.inf, "\u2212∞"), (math.nan, "\u2013"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, written):
    """Counts have thin spaces, other numbers few digits, small ones a plain exponent."""
    assert number(value) == written


@given(st.floats(1e-9, 1e9))
def test_what_is_spent_is_never_shown_as_less(value):
    """An epsilon is rounded up, by at most one part in a hundred, or in ten if it is tiny."""
    shown = float(ceiling(value).replace("\u202f", ""))
    assert value * (1 - 1e-9) <= shown <= value * (1.011 if value >= 1e-3 else 1.101)


def test_units_are_written_for_people():
    """Shares, differences, times and counts carry their unit or sign."""
    assert percent(0.8123) == "81.2\u202f%"
    assert [points(0.021), points(-0.004), points(0.0)] == ["+2.1", "\u22120.4", "+0.0"]
    assert [duration(s) for s in (0.004, 3.14, 64, 600, 9000)] == [
        "4\u202fms", "3.1\u202fs", "64\u202fs", "10\u202fmin", "2\u202fh 30\u202fmin",
    ]  # fmt: skip
    assert [count(1, "round"), count(2, "round")] == ["1 round", "2 rounds"]
    assert [joined([]), joined(["a"]), joined(["a", "b", "c"]), joined(["a", "b", "c"], 2)] == [
        "", "a", "a, b and c", "a, b and 1 more",
    ]  # fmt: skip


def test_every_failure_code_has_its_sentence():
    """Each failure that a peer can report is explained, and an unknown one does not break the page."""
    assert all(failure_sentence(code.slug) == code.sentence for code in FailureCode)
    assert failure_sentence("from-a-later-version")


def test_quantiles_are_values_that_occur():
    """Quantiles run from the smallest to the largest value, by nearest rank."""
    ranked = quantiles([5.0, 1.0, 3.0])
    assert [ranked[0], ranked[3], ranked[-1]] == [("smallest", 1.0), ("median", 3.0), ("largest", 5.0)]
    assert {value for _, value in ranked} <= {1.0, 3.0, 5.0}


@given(epsilon=st.floats(0, 40), delta=st.floats(1e-12, 0.1))
def test_meaning_never_promises_more_than_the_guarantee(epsilon, delta):
    """The two ceilings are those of randomised response with failure, the worst mechanism with this epsilon and delta.

    That mechanism reveals its input with probability delta and otherwise answers truly with odds e^epsilon.
    """
    facts = PrivacyResult(target_delta=delta)
    text = _meaning(facts, epsilon)[1].replace("\u202f", " ")
    guess, found = (float(text.split(f"{phrase} at most ")[1].split(" ")[0]) for phrase in ("right", "detects"))
    truthful = delta + (1 - delta) / (1 + math.exp(-epsilon))
    lie = (1 - delta) / (1 + math.exp(epsilon))
    assert 0 <= guess - 100 * (truthful + 1 - lie) / 2 + 1e-9 <= 0.1001
    # Its receiver operating curve: accuse on the revealed answer, then on some of the "yes", then on all.
    false_alarms = 0.01
    detected = (
        delta + false_alarms * math.exp(epsilon)
        if false_alarms <= lie
        else truthful + (false_alarms - lie) / (1 - lie - delta) * (1 - truthful)
    )
    assert 0 <= found - 100 * detected + 1e-9 <= 0.1001


def test_meaning_claims_no_bound_where_there_is_none():
    """Without a finite epsilon no ceiling is stated."""
    facts = PrivacyResult(target_delta=1e-5)
    assert not any("at most" in s for epsilon in (None, math.inf) for s in _meaning(facts, epsilon))


@pytest.mark.parametrize(
    ("unit", "trust", "words"),
    [
        ("example", "nobody", "protects single examples"),
        ("client", "coordinator", "everybody but the coordinator, which sees each client's update"),
        ("client", "", "everybody but the coordinator, which sees each client's update"),
        ("client", "cohort", "the coordinator too, which sees nothing but sums"),
    ],
)
def test_meaning_says_whom_it_holds_against(unit, trust, words):
    """Also of runs that were recorded before that was written down."""
    facts = PrivacyResult(unit=unit, trust=trust, target_delta=1e-5)
    assert words in _meaning(facts, 2.0)[-1]


@pytest.mark.parametrize(
    ("colluding", "words"), [(0, "while none of the clients"), (3, "while at most 3 of the clients")]
)
def test_meaning_of_distributed_noise_names_its_condition(colluding, words):
    """How many honest clients' noise is counted, and how many may help whoever looks."""
    shares = SharesResult(mechanism="skellam", honest=4, colluding=colluding)
    facts = PrivacyResult(unit="client", trust="cohort", relation=UPDATE_REPLACED, shares=shares, target_delta=1e-5)
    first, *_, last = _meaning(facts, 2.0)
    assert "with and without what one client learnt" in first
    assert "4 honest clients" in last
    assert words in last


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), whole=st.booleans())
def test_ticks_lie_within_their_axis(low, span, whole):
    """Ticks rise, stay within the axis and are never crowded; whole ones are whole."""
    found = ticks(low, low + span, whole=whole)
    assert found == sorted(set(found))
    assert len(found) <= 12
    room = 1e-8 * (span + abs(low))  # less than can be seen
    assert all(low - room <= t <= low + span + room for t in found)
    assert not whole or all(t == round(t) for t in found)


def test_ranges_leave_room():
    """A range holds all values with a margin, whatever there is to hold."""
    assert padded([]) == (0.0, 1.0)
    low, high = padded([2.0])
    assert low < 2 < high
    assert padded([0.0, 1.0], floor=0, ceiling=1) == (0, 1)
    assert padded([math.nan, 0.0, 1.0])[1] > 1


def test_long_lines_are_thinned():
    """A line of very many rounds keeps its first and last point and few between."""
    points = [(float(i), float(i)) for i in range(10_000)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert [thinned[0], thinned[-1]] == [points[0], points[-1]]
    assert thin(points[:5]) == points[:5]


def test_drawings_escape_text_and_attributes():
    """Text, tooltips, labels and attributes come out escaped."""
    plot = Plot(x=(0, 1), y=(0, 1))
    plot.text(0, 0, "<b>", title='"<i>')
    plot.dot(0.5, 0.5, "s1", "<u>")
    drawing = plot.draw('"><script>')
    assert all(raw not in drawing for raw in ("<b>", "<i>", "<u>", "<script>"))
    assert tag("a", "<b>", class_='"') == '<a class="&#34;">&lt;b&gt;</a>'
