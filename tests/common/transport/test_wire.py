"""The control messages' classes are generated, and committed so that users need no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import common.transport

FOLDER = Path(common.transport.__file__).parent


def test_committed_classes_are_those_of_the_description(tmp_path: Path) -> None:
    """`make wire` after every change of wire.proto."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--python_out={tmp_path}"]
    subprocess.run([*command, f"--pyi_out={tmp_path}", "wire.proto"], check=True, timeout=120)
    for name in ("wire_pb2.py", "wire_pb2.pyi"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()
