"""One training at a time on an accelerator, over all processes of a machine."""

import fcntl
import os
import threading

import pytest
import torch
from flwr.app import Message, RecordDict

from client.mods import device as device_module
from client.mods.device import device_lock, device_mod
from common.flower import client_context, prepare_process
from tests.client.conftest import run, train_message

BOUND = 60.0


def free(path) -> bool:
    """Whether another process could take the lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_a_lock_is_held_for_the_block(tmp_path):
    """And free afterwards."""
    with device_lock("gpu-0", tmp_path):
        assert not free(tmp_path / "coterie-gpu-0.lock")
    assert free(tmp_path / "coterie-gpu-0.lock")


def test_a_second_training_waits_for_the_first(tmp_path):
    """Whichever process it is of; other devices are free."""
    order = []
    first_in, first_out = threading.Event(), threading.Event()

    def first():
        with device_lock("gpu-0", tmp_path):
            first_in.set()
            assert first_out.wait(BOUND)
            order.append("first")

    def second():
        with device_lock("gpu-0", tmp_path):
            order.append("second")

    threads = [threading.Thread(target=work) for work in (first, second)]
    threads[0].start()
    assert first_in.wait(BOUND)
    threads[1].start()
    with device_lock("gpu-1", tmp_path):
        order.append("other")
    first_out.set()
    for thread in threads:
        thread.join(BOUND)
    assert order == ["other", "first", "second"]


def test_holders_that_share_it_do_not_wait_for_each_other(tmp_path):
    """And one who wants it alone waits for all of them."""
    with device_lock("gpu-0", tmp_path, shared=True), device_lock("gpu-0", tmp_path, shared=True):
        assert not free(tmp_path / "coterie-gpu-0.lock")
    assert free(tmp_path / "coterie-gpu-0.lock")


def test_a_link_that_somebody_laid_is_not_followed(tmp_path):
    """Everybody may write in a temporary folder; training goes on without the lock."""
    target = tmp_path / "target"
    (tmp_path / "coterie-gpu-0.lock").symlink_to(target)
    with device_lock("gpu-0", tmp_path):
        assert not target.exists()


@pytest.mark.parametrize(("device", "locks"), [("cpu", []), ("cuda", ["gpu"]), ("mps", ["gpu"])])
def test_a_round_locks_the_device_that_it_trains_on(monkeypatch, device, locks):
    """A CPU is shared."""
    prepare_process()
    taken = []

    class Lock:
        def __init__(self, name):
            taken.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(device_module, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(device_module, "device_name", lambda _: "gpu")
    monkeypatch.setattr(device_module, "device_lock", Lock)
    message = train_message(run())
    reply = device_mod(message, client_context(node_id=2, partition=0), lambda m, _: Message(RecordDict(), reply_to=m))
    assert taken == locks
    assert not reply.has_error()
