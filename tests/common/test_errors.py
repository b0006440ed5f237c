"""Codes and exit codes are promises to scripts and peers: they never change."""

import common.errors
from common.errors import CoterieError, FailureCode, PeerError

EXITS = {
    "CoterieError": ("error", 1),
    "ConfigError": ("config-invalid", 3),
    "SiteError": ("site-invalid", 4),
    "DataError": ("data-invalid", 5),
    "DataUnavailableError": ("data-unavailable", 6),
    "ModelError": ("model-invalid", 7),
    "PrivacyError": ("privacy-refused", 8),
    "BudgetExhaustedError": ("budget-exhausted", 8),
    "LedgerError": ("ledger-invalid", 8),
    "RunError": ("run-failed", 9),
    "RefusedError": ("refused", 10),
    "KitError": ("kit-invalid", 11),
    "UnreachableError": ("unreachable", 12),
}
FAILURES = {
    "client-failed": 1001,
    "deadline-exceeded": 1002,
    "non-finite-update": 1003,
    "budget-exhausted": 1004,
    "invalid-request": 1005,
    "invalid-reply": 1006,
    "client-lost": 1007,
    "policy-refused": 1008,
    "not-in-epoch": 1009,
    "aggregation-refused": 1010,
    "aggregation-aborted": 1011,
    "stale-update": 1012,
}


def tree(kind=CoterieError):
    """All kinds of error that `common.errors` declares."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == common.errors.__name__:
            yield from tree(child)


def test_codes_and_exit_codes_are_stable():
    """Scripts branch on them; a new kind of error gets a line here."""
    assert {kind.__name__: (kind.code, kind.exit_code) for kind in tree()} == EXITS


def test_every_kind_has_a_code_of_its_own():
    """Two kinds with one code could not be told apart."""
    codes = [kind.code for kind in tree()]
    assert len(set(codes)) == len(codes)
    assert not {kind.exit_code for kind in tree()} & {0, 2, 130}


def test_the_drawn_tree_shows_every_kind_with_its_exit_code():
    """The picture atop the module is the truth."""
    lines = common.errors.__doc__.splitlines()
    for name, (_, exit_code) in EXITS.items():
        if name != "CoterieError":
            (line,) = (line for line in lines if f"── {name} " in line)
            assert f" {exit_code}  " in line


def test_a_hint_is_kept_beside_the_message():
    """What failed, and how to mend it, are two sentences."""
    error = CoterieError("it broke", hint="mend it")
    assert (str(error), error.hint) == ("it broke", "mend it")
    assert CoterieError("it broke").hint == ""


class TestFailureCode:
    """All that a peer learns of a failure."""

    def test_numbers_are_frozen(self):
        """They travel between versions."""
        assert {code.slug: int(code) for code in FailureCode} == FAILURES

    def test_sentences_are_fixed_and_distinct(self):
        """No room for a value: a sentence that could be filled in could quote data."""
        sentences = [code.sentence for code in FailureCode]
        assert len(set(sentences)) == len(FAILURES)
        for sentence in sentences:
            assert not set("{}%$:\n'\"0123456789") & set(sentence.replace("client's", ""))

    def test_a_peer_error_says_its_code_s_sentence_and_no_more(self):
        """It cannot carry text of its own."""
        error = PeerError(FailureCode.INVALID_REQUEST)
        assert error.args == (FailureCode.INVALID_REQUEST.sentence,)
        assert error.failure is FailureCode.INVALID_REQUEST
