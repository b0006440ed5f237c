"""What a transfer costs without any of ours: a file read, sent over a TLS 1.3 socket with client certificates, written.

Run as a process: `python -m simulations.benchmarks.plane.raw FOLDER BYTES` takes one transfer a connection, and prints
the CPU seconds of each.
"""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path
from time import process_time

BUFFER = 1 << 20


def context(folder: Path, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 alone, AES-256-GCM, certificates at both ends, as the plane has them."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(folder / "chain.pem", folder / "private.pem")
    made.load_verify_locations(folder / "ca.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def receive(connection: ssl.SSLSocket, into: Path, size: int) -> None:
    """Write `size` bytes to a file."""
    buffer, left = memoryview(bytearray(BUFFER)), size
    with into.open("wb", buffering=0) as file:
        while left:
            count = connection.recv_into(buffer, min(BUFFER, left))
            if not count:
                raise ConnectionError("cut off")
            file.write(buffer[:count])
            left -= count


def send(path: Path, folder: Path, port: int, name: str) -> float:
    """Send a file; CPU seconds of this process."""
    tls = context(folder, server=False)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        tls.wrap_socket(plain, server_hostname=name) as connection,
    ):
        begin = process_time()
        buffer = memoryview(bytearray(BUFFER))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                connection.sendall(buffer[:count])
        connection.recv(1)  # all of it has arrived
        return process_time() - begin


def main() -> None:
    """Serve transfers until stdin closes."""
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    tls = context(folder, server=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        for _ in sys.stdin:  # one line, one transfer
            plain, _ = listener.accept()
            with tls.wrap_socket(plain, server_side=True) as connection:
                begin = process_time()
                receive(connection, folder / "received", size)
                connection.send(b".")
                print(process_time() - begin, flush=True)


if __name__ == "__main__":
    main()
