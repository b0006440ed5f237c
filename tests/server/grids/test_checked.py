"""Nothing that a client sends gets past `CheckedGrid` unless it fits the model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, METRICS, WEIGHT, NumpyArray, failure_of, failure_reply, prepare_process
from server.grids import CheckedGrid
from tests.helpers.grids import ScriptedGrid, train_messages, update

prepare_process()

MODEL = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int64)}
NODES = (7, 3, 5)


def fitting(**changes: Any) -> dict[str, Any]:
    return {**{name: values + 1 for name, values in MODEL.items()}, **changes}


def reply_with(content: RecordDict) -> Callable[[Message], Message]:
    return lambda message: Message(content, reply_to=message)


def check(
    answer: Callable[[list[Message]], Iterable[Message]], *, equal_weights: bool = False, nodes: Iterable[int] = NODES
) -> tuple[list[Message], dict[int, FailureCode | None]]:
    """What comes out, and the fates that were told by node."""
    fates: dict[int, FailureCode | None] = {}

    def on_reply(message: Message, failure: FailureCode | None) -> None:
        assert message.metadata.dst_node_id not in fates, "told twice"
        fates[message.metadata.dst_node_id] = failure

    grid = CheckedGrid(
        ScriptedGrid(answer),
        template=MODEL,
        equal_weights=equal_weights,
        metrics=["train_loss"],
        largest=2.0**32,
        on_reply=on_reply,
    )
    return list(grid.send_and_receive(messages=train_messages(MODEL, list(nodes)), timeout=4.0)), fates


def fate(make_reply: Callable[[Message], Message], *, equal_weights: bool = False) -> FailureCode | None:
    """What becomes of one client's reply, while two others answer soundly."""

    def answer(messages: list[Message]) -> Iterable[Message]:
        sound = reply_with(update(fitting(), 1.0, train_loss=0.5))
        return [make_reply(messages[0]), *map(sound, messages[1:])]

    replies, fates = check(answer, equal_weights=equal_weights)
    assert [fates[node] for node in NODES[1:]] == [None, None]
    assert [failure_of(reply) for reply in replies] == [fates[node] for node in NODES]
    assert len(replies) == len(NODES)
    return fates[NODES[0]]


def fate_of(content: RecordDict, *, equal_weights: bool = False) -> FailureCode | None:
    return fate(reply_with(content), equal_weights=equal_weights)


class TestSoundReplies:
    def test_pass_untouched(self) -> None:
        """A sound reply comes out as the very object that went in, in the order of arrival."""
        sent: list[Message] = []

        def answer(messages: list[Message]) -> Iterable[Message]:
            for message in reversed(messages):
                sent.append(Message(update(fitting(), 2.5, train_loss=0.1), reply_to=message))
                yield sent[-1]

        replies, fates = check(answer)
        assert all(a is b for a, b in zip(replies, sent, strict=True))
        assert fates == dict.fromkeys(NODES)

    @pytest.mark.parametrize("weight", [1, 1.0, 0.001, 12345, 2.0**53])
    def test_any_real_weight_counts(self, weight: float) -> None:
        """Where weights may differ, every positive one up to 2^53 is taken."""
        assert fate_of(update(fitting(), weight, train_loss=0.5)) is None

    @pytest.mark.parametrize("weight", [1, 1.0])
    def test_one_is_the_equal_weight(self, weight: float) -> None:
        """Where all count the same, the weight is 1."""
        assert fate_of(update(fitting(), weight, train_loss=0.5), equal_weights=True) is None


class TestWeights:
    @pytest.mark.parametrize("weight", [0, 0.0, -1, -0.5, np.nan, np.inf, -np.inf, 2.0**54, 1e308, 10**400, [1.0]])
    def test_impossible_weight_is_refused(self, weight: float) -> None:
        """Zero, negative, non-finite, many-valued or so large that a sum could overflow: not a weight."""
        assert fate_of(update(fitting(), weight, train_loss=0.5)) is FailureCode.INVALID_REPLY

    @pytest.mark.parametrize("weight", [0.999, 2, 100.0])
    def test_other_weight_is_refused_where_all_count_the_same(self, weight: float) -> None:
        """With equal weights, nobody may count more, or reveal a count."""
        assert fate_of(update(fitting(), weight, train_loss=0.5), equal_weights=True) is FailureCode.INVALID_REPLY

    def test_missing_weight_is_refused(self) -> None:
        """A reply says how much it counts."""
        content = update(fitting(), train_loss=0.5)
        del content[METRICS][WEIGHT]
        assert fate_of(content) is FailureCode.INVALID_REPLY


class TestArrays:
    @pytest.mark.parametrize(
        "arrays",
        [
            {},
            {"w": fitting()["w"]},
            {**fitting(), "more": np.zeros(1, np.float32)},
            {"W": fitting()["w"], "b": fitting()["b"], "n": fitting()["n"]},
            dict(reversed(fitting().items())),
            fitting(w=np.zeros((3, 2), np.float32)),
            fitting(w=np.zeros(6, np.float32)),
            fitting(w=np.zeros((0, 3), np.float32)),
            fitting(w=np.zeros((2, 3), np.float64)),
            fitting(w=np.zeros((2, 3), ">f4")),
            fitting(w=np.zeros((2, 3), np.complex64)),
            fitting(n=np.zeros((), np.float32)),
            fitting(n=np.zeros(1, np.int64)),
        ],
        ids=[
            "none", "too few", "too many", "another name", "another order", "transposed", "flat", "empty", "float64",
            "big-endian", "complex", "float for integer", "vector for scalar",
        ],
    )  # fmt: skip
    def test_misfit_is_refused(self, arrays: dict[str, Any]) -> None:
        """Names, their order (strategies pair arrays by position), shapes and dtypes are exactly the model's."""
        assert fate_of(update(arrays, train_loss=0.5)) is FailureCode.INVALID_REPLY

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_single_value_that_is_not_finite_is_refused(self, value: float) -> None:
        """One NaN or infinity among many values condemns the update, with a reason of its own."""
        spoilt = fitting()["w"].copy()
        spoilt[1, 2] = value
        assert fate_of(update(fitting(w=spoilt), train_loss=0.5)) is FailureCode.NON_FINITE_UPDATE

    def test_claimed_shape_counts_for_nothing(self) -> None:
        """What an array claims to be is not believed: its bytes are decoded."""
        content = update(fitting(), train_loss=0.5)
        honest = Array(np.zeros((3, 2), np.float32))
        content[ARRAYS]["w"] = Array(dtype="float32", shape=(2, 3), stype=honest.stype, data=honest.data)
        assert fate_of(content) is FailureCode.INVALID_REPLY

    @pytest.mark.parametrize("kind", ["archive", "broken archive", "huge", "cut off", "empty", "pickle", "stype"])
    def test_bytes_that_are_no_array_are_refused(self, kind: str) -> None:
        """Archives, headers that ask for terabytes, pickles and fragments fail their sender, not the round."""
        archive, pickled = io.BytesIO(), io.BytesIO()
        np.savez(archive, a=np.zeros(2))
        np.save(pickled, np.array([{"a": 1}], dtype=object))
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117) + b"\n"
        data = {
            "archive": archive.getvalue(),
            "broken archive": b"PK\x03\x04 and no more",
            "huge": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
            "cut off": NumpyArray(MODEL["w"]).data[:-1],
            "empty": b"",
            "pickle": pickled.getvalue(),
            "stype": b"",
        }[kind]
        content = update(fitting(), train_loss=0.5)
        stype = "torch" if kind == "stype" else "numpy.ndarray"
        content[ARRAYS]["w"] = Array(dtype="float32", shape=(2, 3), stype=stype, data=data)
        assert fate_of(content) is FailureCode.INVALID_REPLY

    @settings(max_examples=150)
    @given(st.binary(max_size=120), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", b"PK\x03\x04"]))
    def test_no_bytes_stop_the_round(self, data: bytes, magic: bytes) -> None:
        """Whatever bytes stand for an array, their sender fails and the others' replies are returned."""
        content = update(fitting(), train_loss=0.5)
        content[ARRAYS]["w"] = Array(dtype="float32", shape=(2, 3), stype="numpy.ndarray", data=magic + data)
        assert fate_of(content) is FailureCode.INVALID_REPLY


class TestRecords:
    def test_other_records_are_refused(self) -> None:
        """A reply holds arrays and metrics under their names, and nothing beside them."""
        arrays, metrics = update(fitting(), train_loss=0.5).values()
        contents = [
            RecordDict(),
            RecordDict({ARRAYS: arrays}),
            RecordDict({METRICS: metrics}),
            RecordDict({ARRAYS: metrics, METRICS: arrays}),
            RecordDict({"others": arrays, METRICS: metrics}),
            RecordDict({ARRAYS: arrays, METRICS: metrics, CONFIG: ConfigRecord()}),
            RecordDict({ARRAYS: arrays, METRICS: metrics, "more": ArrayRecord()}),
            RecordDict({ARRAYS: arrays, METRICS: metrics, "more": MetricRecord({"accuracy": 1.0})}),
        ]
        assert {fate_of(content) for content in contents} == {FailureCode.INVALID_REPLY}

    @pytest.mark.parametrize("value", [1e10, -1e10, 3e38])
    def test_single_value_that_a_strategy_could_overflow_at_is_refused(self, value: float) -> None:
        """Squares of it, summed over a model, have no place in float32; the largest allowed one passes."""
        assert fate_of(update(fitting(w=np.full((2, 3), 2.0**32, np.float32)), train_loss=0.5)) is None
        spoilt = fitting()["w"].copy()
        spoilt[1, 2] = value
        assert fate_of(update(fitting(w=spoilt), train_loss=0.5)) is FailureCode.NON_FINITE_UPDATE

    @pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**53 + 2])
    def test_integer_beyond_what_a_mean_is_exact_for_is_refused(self, value: int) -> None:
        """The mean is formed in float64, where the largest integers would come back as the smallest."""
        assert fate_of(update(fitting(n=np.array(value)), train_loss=0.5)) is FailureCode.NON_FINITE_UPDATE
        assert fate_of(update(fitting(n=np.array(2**53)), train_loss=0.5)) is None

    def test_model_that_holds_larger_values_itself_is_trained_all_the_same(self) -> None:
        """A buffer of the user's own model may be large: replies may go up to twice its largest value."""
        template = {"w": np.array([3e10], np.float32)}
        fates: list[FailureCode | None] = []
        for value in (6e10, 7e10):
            content = update({"w": np.array([value], np.float32)})
            grid = CheckedGrid(
                ScriptedGrid(lambda sent, content=content: [Message(content, reply_to=sent[0])]),
                template=template,
                equal_weights=True,
                metrics=(),
                largest=2.0**32,
                on_reply=lambda _, failure: fates.append(failure),
            )
            list(grid.send_and_receive(train_messages(template, [2])))
        assert fates == [None, FailureCode.NON_FINITE_UPDATE]

    @pytest.mark.parametrize(
        "metrics", [{}, {"train_loss": 0.5, "accuracy": 1.0}, {"loss": 0.5}, {"train_loss": [0.5]}]
    )
    def test_other_metrics_are_refused(self, metrics: dict[str, Any]) -> None:
        """Exactly the metrics of the run: one reply with others would make Flower's strategies give up the round."""
        assert fate_of(update(fitting(), 1.0, **metrics)) is FailureCode.INVALID_REPLY

    @pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf, 10**400])
    def test_metric_that_is_not_finite_is_refused(self, loss: float) -> None:
        """Metrics are averaged, too."""
        assert fate_of(update(fitting(), 1.0, train_loss=loss)) is FailureCode.NON_FINITE_UPDATE

    def test_negative_loss_is_refused(self) -> None:
        """A loss lies at or above 0; below it, a client could steer strategies that weigh by losses."""
        assert fate_of(update(fitting(), 1.0, train_loss=-0.5)) is FailureCode.INVALID_REPLY
        assert fate_of(update(fitting(), 1.0, train_loss=0.0)) is None


class TestAnswers:
    @pytest.mark.parametrize("failure", FailureCode)
    def test_typed_failure_keeps_its_type(self, failure: FailureCode) -> None:
        """A client that says why it failed is quoted."""
        assert fate(lambda message: failure_reply(message, failure)) is failure

    def test_other_errors_become_typed_and_lose_their_text(self) -> None:
        """An error of Flower or of a stranger reads as a failed client; its text, which can quote data, is dropped."""
        replies, fates = check(lambda messages: [Message(Error(4, "age 83"), reply_to=messages[0])], nodes=[7])
        assert fates == {7: FailureCode.CLIENT_FAILED}
        assert "83" not in replies[0].error.reason

    def test_client_that_never_answers_missed_the_deadline(self) -> None:
        """Whoever was asked and did not answer gets a failure, after all others."""
        sound = reply_with(update(fitting(), train_loss=0.5))
        replies, fates = check(lambda messages: [sound(messages[1])])
        missed = FailureCode.DEADLINE_EXCEEDED
        assert fates == {3: None, 7: missed, 5: missed}
        assert [reply.metadata.src_node_id for reply in replies] == [3, 7, 5]

    def test_second_answer_is_dropped(self) -> None:
        """A client counts once, with its first answer, sound or not."""
        sound, unsound = reply_with(update(fitting(), train_loss=0.5)), reply_with(RecordDict())
        replies, fates = check(lambda m: [unsound(m[0]), sound(m[0]), sound(m[1]), sound(m[1]), sound(m[2])])
        assert [reply.metadata.src_node_id for reply in replies] == list(NODES)
        assert fates == {7: FailureCode.INVALID_REPLY, 3: None, 5: None}

    def test_answer_of_nobody_who_was_asked_is_dropped(self) -> None:
        """A node outside the cohort cannot bring in an update."""
        (stranger,) = train_messages(MODEL, [99])
        sound = reply_with(update(fitting(), train_loss=0.5))
        replies, fates = check(lambda messages: [sound(stranger), *map(sound, messages)])
        assert [reply.metadata.src_node_id for reply in replies] == list(NODES)
        assert fates == dict.fromkeys(NODES)
