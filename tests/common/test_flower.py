"""Everything that Coterie takes from Flower beyond its public API; a new version of flwr has to pass all of this."""

import logging
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common.errors import FailureCode
from common.flower import (
    ARRAYS,
    CONFIG,
    METRICS,
    RUN_ID,
    SERVER_NODE_ID,
    WEIGHT,
    NumpyArray,
    arrays_of,
    client_context,
    config_of,
    failure_of,
    failure_reply,
    from_record,
    metrics_of,
    prepare_process,
    stamp,
    to_record,
    update_reply,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def message():
    """A training message as a client receives it."""
    prepare_process()
    content = RecordDict({ARRAYS: to_record({"w": np.ones(2, np.float32)}), CONFIG: ConfigRecord({"run": "r"})})
    return stamp(Message(content, 7, "train"), message_id="m1")


def test_the_installed_flower_is_the_pinned_one():
    """Names that are not public may change in any version, so exactly one is allowed."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (pin,) = (re.match(r"flwr==([\d.]+)$", line) for line in dependencies if line.startswith("flwr"))
    assert pin[1] == version("flwr")


class TestTaskIdentity:
    """A message cannot be built outside a Flower task without an identity."""

    def test_a_bare_process_can_build_messages_after_prepare_process(self):
        """And could not before: once it can, `TaskIdentity` is no longer needed."""
        code = """
from flwr.app import Message, RecordDict
from common.flower import prepare_process
try:
    Message(RecordDict(), 7, "train")
except RuntimeError:  # not set
    prepare_process()
    print(Message(RecordDict(), 7, "train").metadata.dst_node_id)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "7\n"

    def test_an_identity_that_flower_has_set_stays(self, monkeypatch):
        """Under Flower's own runtime the process belongs to Flower."""
        for name, value in (("_run_id", 31), ("_node_id", 32), ("_task_id", 33)):
            monkeypatch.setattr(TaskIdentity, name, value)
        prepare_process()
        assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (31, 32, 33)

    def test_flowers_own_log_is_kept_to_errors(self):
        """Its strategies log every step."""
        prepare_process()
        assert logging.getLogger("flwr").level == logging.ERROR


class TestNumpyArray:
    """A Flower `Array` that encodes only when its bytes are asked for."""

    def test_its_values_are_the_array_itself(self):
        """Neither copied nor encoded."""
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert NumpyArray(values).numpy() is values

    def test_its_fields_are_those_of_flowers_own(self):
        """Strategies read them."""
        values = np.arange(6, dtype=np.int16).reshape(2, 3)
        ours, flowers = NumpyArray(values), Array(values)
        assert isinstance(ours, Array)
        for name in ("dtype", "shape", "stype", "data"):
            assert getattr(ours, name) == getattr(flowers, name)

    def test_nothing_is_encoded_before_the_bytes_are_asked_for(self):
        """Bytes follow the array, so they cannot have been made earlier."""
        values = np.zeros(3)
        array = NumpyArray(values)
        values[0] = 5
        assert Array(array.dtype, array.shape, array.stype, array.data).numpy()[0] == 5

    def test_it_travels_between_processes_as_a_plain_array(self):
        """Flower's own processes need not know us."""
        values = np.arange(3.0)
        there = pickle.loads(pickle.dumps(NumpyArray(values)))  # noqa: S301 - our own bytes, in one test
        assert type(there) is Array
        np.testing.assert_array_equal(there.numpy(), values)

    def test_values_that_would_need_pickle_have_no_bytes(self):
        """Nothing that travels is a pickle."""
        with pytest.raises(ValueError, match="pickle"):
            _ = NumpyArray(np.array([object()])).data


class TestRecords:
    """Records over arrays, made by copying an empty one."""

    def test_arrays_go_in_and_come_out_as_themselves(self):
        """No copy, no encoding, in the same order."""
        arrays = {"b": np.zeros(2), "a": np.ones((1, 1), np.int8)}
        found = from_record(to_record(arrays))
        assert list(found) == ["b", "a"]
        assert all(found[name] is arrays[name] for name in arrays)

    def test_copies_of_the_empty_record_are_independent(self):
        """Otherwise one message's weights would appear in all."""
        to_record({"a": np.zeros(1)})
        assert from_record(to_record({"b": np.zeros(1)})).keys() == {"b"}

    def test_a_record_of_ours_is_a_record_of_flowers(self):
        """A strategy may rebuild it."""
        record = to_record({"a": np.zeros(3)})
        assert isinstance(record, ArrayRecord)
        np.testing.assert_array_equal(ArrayRecord(dict(record))["a"].numpy(), np.zeros(3))

    def test_a_message_s_parts_are_found_by_their_kind(self, message):
        """And only by it."""
        assert arrays_of(message.content)["w"].tolist() == [1, 1]
        assert config_of(message.content)["run"] == "r"
        with pytest.raises(KeyError):
            metrics_of(message.content)

    @pytest.mark.parametrize("read", [arrays_of, config_of, metrics_of])
    def test_a_record_of_another_kind_is_none(self, read):
        """A peer chooses the kinds; nothing is taken for what it is not."""
        wrong = RecordDict({ARRAYS: ConfigRecord(), CONFIG: MetricRecord(), METRICS: ArrayRecord()})
        for content in (wrong, RecordDict()):
            with pytest.raises(KeyError):
                read(content)


class TestMessages:
    """Messages, and what Flower's transport would set on them."""

    def test_a_stamped_message_has_an_id_and_belongs_to_the_run(self, message):
        """The fields behind `metadata` are where we think they are."""
        metadata = message.metadata
        assert (metadata.message_id, metadata.run_id, metadata.src_node_id) == ("m1", RUN_ID, SERVER_NODE_ID)

    def test_a_reply_refers_to_its_message(self, message):
        """By which the sender finds whom it is from."""
        reply = update_reply(message, {"w": np.zeros(2)}, {WEIGHT: 1.0})
        assert reply.metadata.reply_to_message_id == "m1"
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (7, SERVER_NODE_ID)

    def test_an_update_holds_weights_and_metrics_and_nothing_else(self, message):
        """What is not there cannot leak; and each reply's records are its own."""
        first = update_reply(message, {"w": np.zeros(2)}, {WEIGHT: 3.0, "train_loss": 0.5})
        second = update_reply(message, {"v": np.zeros(1)}, {WEIGHT: 1.0})
        assert set(first.content) == set(second.content) == {ARRAYS, METRICS}
        assert dict(metrics_of(first.content)) == {WEIGHT: 3.0, "train_loss": 0.5}
        assert dict(metrics_of(second.content)) == {WEIGHT: 1.0}
        assert arrays_of(second.content).keys() == {"v"}

    @pytest.mark.parametrize("failure", FailureCode)
    def test_a_failure_travels_as_its_code_and_fixed_sentence(self, message, failure):
        """And is read back as the same."""
        reply = failure_reply(message, failure)
        assert (reply.error.code, reply.error.reason) == (int(failure), failure.sentence)
        assert failure_of(reply) is failure

    def test_an_update_is_no_failure_and_flowers_own_errors_are_a_failed_client(self, message):
        """Whatever the code."""
        assert failure_of(update_reply(message, {}, {})) is None
        assert failure_of(Message(Error(code=3, reason="secret"), reply_to=message)) is FailureCode.CLIENT_FAILED

    def test_contexts_do_not_share_their_state(self):
        """One client's state is not another's."""
        one, two = client_context(node_id=2, partition=0), client_context(node_id=3, partition=1)
        one.state["x"] = ConfigRecord()
        assert not two.state
        assert (two.node_id, two.node_config["partition-id"], two.run_id) == (3, 1, RUN_ID)
