"""A real Orthanc of the tests' own, behind TLS, in a network namespace with nothing but loopback.

Orthanc has no setting for the address it listens on, so it gets a network of its own. The namespace is entered by the
calling thread alone, and left again after each test. TLS is ended by a relay, as a hospital's proxy does: Debian's
Orthanc 1.10 crashes on HTTPS.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

USER, PASSWORD = "releaser", "never-to-be-seen-in-any-output"
PLUGINS = Path("/usr/share/orthanc/plugins")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """A part of the world that is not here; the text says which."""


def _namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        # SIOCSIFFLAGS with IFF_UP | IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x41))


class Orthanc:
    """HTTPS on 8443 under /dicom-web, DICOM on 4242 as ORTHANC; `certificate` is what a client must trust."""

    title, dicom_port, web_port, plain_port = "ORTHANC", 4242, 8443, 8042

    def __init__(self, folder: Path) -> None:
        program = shutil.which("Orthanc")
        if program is None or not (PLUGINS / "libOrthancDicomWeb.so").exists():
            raise Missing("Orthanc is not here: apt-get install orthanc orthanc-dicomweb")
        self._home = _namespace()
        if _LIBC.unshare(_CLONE_NEWNET):
            raise Missing("no network namespace may be made here: run the tests as root")
        self._own = _namespace()
        try:
            _loopback_up()
            self.certificate = _certificate(folder)
            config = folder / "orthanc.json"
            config.write_text(json.dumps(self._config(folder)))
            with (folder / "log").open("wb") as log:
                self._process = subprocess.Popen([program, config], stdout=log, stderr=log, cwd=folder)
            self._relay = _Relay(folder / "server.pem", self.web_port, self.plain_port)
            self._wait(folder / "log")
        finally:
            _enter(self._home)

    def _config(self, folder: Path) -> dict[str, Any]:
        return {
            "Name": "tests",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.plain_port,
            "DicomPort": self.dicom_port,
            "DicomAet": self.title,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowStore": True,
            "RemoteAccessAllowed": True,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "Plugins": [str(PLUGINS / "libOrthancDicomWeb.so")],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }

    @property
    def web_address(self) -> str:
        return f"dicomweb://localhost:{self.web_port}/dicom-web"

    @property
    def plain_address(self) -> str:
        return f"dicomweb+http://127.0.0.1:{self.plain_port}/dicom-web"

    @property
    def dicom_address(self) -> str:
        return f"dicom://{self.title}@127.0.0.1:{self.dicom_port}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread, and the programs and threads it starts, into Orthanc's network."""
        _enter(self._own)
        try:
            yield
        finally:
            _enter(self._home)

    def ask(self, path: str, method: str = "GET") -> Any:
        """Call Orthanc's own REST interface, inside its network."""
        login = b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        url = f"https://localhost:{self.web_port}/{path}"
        request = urllib.request.Request(url, method=method, headers={"Authorization": f"Basic {login}"})
        trust = ssl.create_default_context(cafile=str(self.certificate))
        with urllib.request.urlopen(request, timeout=20, context=trust) as answer:
            return json.loads(answer.read() or b"null")

    def instances(self) -> int:
        return int(self.ask("statistics")["CountInstances"])

    def clear(self) -> None:
        for study in self.ask("studies"):
            self.ask(f"studies/{study}", "DELETE")

    def _wait(self, log: Path) -> None:
        deadline, last = time.monotonic() + 30, ""
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.ask("system")
                return
            except OSError as error:
                last = str(error)
                time.sleep(0.1)
        self._process.kill()
        raise RuntimeError(f"{last}: {log.read_text()[-1500:]}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._relay.close()
        os.close(self._own)
        os.close(self._home)


class _Relay:
    """Ends TLS on one port of loopback and passes what comes to another, in the network of the thread that made it."""

    def __init__(self, pem: Path, outside: int, inside: int) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(pem)
        self._outside, self._inside = outside, inside
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self._outside, ssl=self._context))
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._inside)
        await asyncio.gather(self._pump(reader, back_writer), self._pump(back_reader, writer))

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


def _certificate(folder: Path) -> Path:
    """Write server.pem (key and certificate) and ca.pem for localhost; return the latter."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=2))
    builder = builder.add_extension(names, False).add_extension(x509.BasicConstraints(True, None), True)
    certificate = builder.sign(key, hashes.SHA256())
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + public)
    (folder / "ca.pem").write_bytes(public)
    return folder / "ca.pem"
