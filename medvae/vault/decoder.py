"""Compressed pixels are decoded in a process of their own: a stream that crashes a decoder costs its file only.

The decoders are libraries in C and C++ (GDCM, OpenJPEG, libjpeg, CharLS), and malformed streams do abort them. The
child has a bound on its memory and each call one on its time; what comes back is one line of JSON and plain numbers, so
that even a child that a file has taken over can only answer with pixels.

    python -m medvae.vault.decoder        reads requests on stdin until it ends; not for use by hand
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medvae.vault.scan import REMEDIES, Rules, Unusable

SECONDS = 120.0  # the longest that one file may take
MARGIN = 2**31  # bytes of address space beside the pixels
LINE = 2**20  # bytes of an answer's first line
CRASHED = "decoder crashed"


class Decoder:
    """A child process that is started with the first request, and again after it died."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._most = 0

    def frames(
        self, what: str, path: Path, indices: Sequence[int] | None, rules: Rules
    ) -> list[npt.NDArray[np.float32]]:
        """Return what `what` ("gray" or "stored") reads of the file, each (rows, columns) float32.

        Raises Unusable with the child's verdict, or where it died or was too slow.
        """
        if self._child is not None and rules.max_voxels > self._most:
            self.close()
        child = self._child or self._start(rules)
        wanted = None if indices is None else list(indices)
        request = {"what": what, "path": str(path), "indices": wanted, "rules": asdict(rules)}
        try:
            _pipe(child.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(child.stdin).flush()
            return self._answer(_pipe(child.stdout), rules)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self.close()
            raise Unusable(CRASHED) from None

    def _start(self, rules: Rules) -> subprocess.Popen[bytes]:
        self._most = rules.max_voxels
        command = [sys.executable, "-m", "medvae.vault.decoder", str(16 * rules.max_voxels + MARGIN)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        atexit.register(self.close)
        return self._child

    def _answer(self, pipe: IO[bytes], rules: Rules) -> list[npt.NDArray[np.float32]]:
        until = time.monotonic() + SECONDS
        line = b""
        while not line.endswith(b"\n"):
            line += _read(pipe, 1 if len(line) < LINE else 0, until)  # the pixels begin right after the line
        said = json.loads(line)
        if "reason" in said:
            raise Unusable(said["reason"] if said["reason"] in REMEDIES else CRASHED)
        count, rows, columns = (int(n) for n in said["shape"])
        if min(count, rows, columns) < 1 or count * rows * columns > 8 * rules.max_voxels:
            raise EOFError
        data = bytearray()
        while len(data) < 4 * count * rows * columns:
            data += _read(pipe, 4 * count * rows * columns - len(data), until)
        return list(np.frombuffer(data, dtype="<f4").reshape(count, rows, columns))

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
        self._child = None


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise EOFError
    return pipe


def _read(pipe: IO[bytes], most: int, until: float) -> bytes:
    left = until - time.monotonic()  # past the bound nothing is read, whether or not something lies ready
    ready = left > 0 and select.select([pipe], [], [], left)[0]
    data = os.read(pipe.fileno(), min(most, 2**20)) if ready and most else b""
    if not data:
        raise EOFError
    return data


_DECODER = Decoder()


def ask(what: str, path: Path, indices: Sequence[int] | None, rules: Rules) -> list[npt.NDArray[np.float32]]:
    """Decode in this process's child; see `Decoder.frames`."""
    return _DECODER.frames(what, path, indices, rules)


def close() -> None:
    """End this process's child, if there is one; the next request starts another."""
    _DECODER.close()


def _serve(most: int) -> None:
    """Answer requests until stdin ends. What libraries print goes nowhere: they quote what they read."""
    import resource
    import signal

    from medvae.vault.dicom_pixels import decode_gray, decode_stored
    from medvae.vault.scan import quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pydicom.pixels  # noqa: F401 - before the bound is set

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = _address_space() + most
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    ways: dict[str, Any] = {"gray": decode_gray, "stored": decode_stored}
    with quiet():
        for line in sys.stdin.buffer:
            asked = json.loads(line)
            try:
                made = ways[asked["what"]](Path(asked["path"]), asked["indices"], Rules(**asked["rules"]))
                stack = np.stack(made).astype("<f4")
            except Unusable as verdict:
                out.write(json.dumps({"reason": verdict.reason}).encode() + b"\n")
            except Exception:
                out.write(json.dumps({"reason": "undecodable pixel data"}).encode() + b"\n")
            else:
                out.write(json.dumps({"shape": stack.shape}).encode() + b"\n")
                out.write(stack.data)
            out.flush()


def _address_space() -> int:
    """Return the bytes that the libraries take before any file; 0 where the system does not tell."""
    import resource

    about = Path("/proc/self/statm")
    return int(about.read_text().split()[0]) * resource.getpagesize() if about.exists() else 0


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
