"""A PostgreSQL server of the tests' own, on loopback, from the programs that Debian's package brings."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PASSWORD = "not-to-be-seen-anywhere"


def programs() -> Path | None:
    """Return the folder of initdb and postgres, or None where the package is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("initdb")
    return found[-1].parent if found else Path(which).resolve().parent if which else None


class Server:
    """One server; as root, it runs as an unprivileged user, since PostgreSQL refuses root."""

    def __init__(self, bin_folder: Path) -> None:
        self.programs = bin_folder
        self.folder = Path(tempfile.mkdtemp(prefix="medvae-postgres-"))
        self._as: dict[str, Any] = {"env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, "cwd": self.folder}
        if os.geteuid() == 0:
            name = next(n for n in ("postgres", "nobody") if any(u.pw_name == n for u in pwd.getpwall()))
            os.chown(self.folder, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
            self._as |= {"user": name, "extra_groups": []}
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        initdb = [bin_folder / "initdb", "-D", self.folder / "data", "-U", "team", "--no-sync", "--no-locale"]
        initdb += ["-A", "scram-sha-256", "--pwfile", password, "-E", "UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, **self._as)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, database: str = "postgres", user: str = "team", port: int | None = None) -> str:
        return f"postgresql://{user}:{PASSWORD}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        # Without fsync: a test kills processes, and not the machine.
        command = [self.programs / "postgres", "-D", self.folder / "data", "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-k", self.folder, "-F"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._as)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                self.execute("SELECT 1")
                return
            except Exception:
                time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text()[-1000:])

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run a statement as the owner of everything."""
        import psycopg

        url = self.url(database)
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Make an empty database and return its name."""
        name = f"d{time.monotonic_ns()}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def stop(self) -> None:
        """Stop at once, as in a crash: every connection dies, and the next start recovers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def make_standby(self) -> None:
        """Let the next start wait for a primary that never speaks: it only reads."""
        (self.folder / "data" / "standby.signal").touch(mode=0o644)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
