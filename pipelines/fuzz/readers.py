"""Fuzz the readers of the vault: whatever the bytes, a verdict or a scan, in bounded time and memory.

    python pipelines/fuzz/readers.py truncate SEEDS            every length of ten small DICOM files
    python pipelines/fuzz/readers.py mutate SEEDS --seconds 600    random changes of bytes, headers first
    python pipelines/fuzz/readers.py atheris SEEDS --seconds 600   coverage-guided changes (pip install atheris)

SEEDS is a folder of DICOM, NIfTI, zip, tar, .npz, picture, NRRD or MetaImage files. Cases of `truncate` and `mutate`
run in a child process with a bound on its memory; a case that crashes it, hangs, or raises anything but the readers own
verdicts is a finding, kept under --keep. Exit code 1 where there was any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from medvae.errors import MedvaeError
from medvae.types import FloatArray
from medvae.vault.archives import is_packed, unpack
from medvae.vault.decoder import close
from medvae.vault.dicom_header import Frame, read_header
from medvae.vault.dicom_pixels import read_frames
from medvae.vault.dicom_plain import read_plain
from medvae.vault.dicom_seg import read_mask
from medvae.vault.discover import discover
from medvae.vault.itk import count_frames, read_itk
from medvae.vault.nifti import read_nifti
from medvae.vault.pictures import read_picture
from medvae.vault.scan import Rules, Skipped, Unusable, quiet

RULES = Rules(colour="luminance", frames="all", max_voxels=2**22)
MEMORY = 3 * 2**30  # bytes of address space above what the libraries take
SLOWEST = 20  # seconds a case may take
LARGEST_SEED = 120_000
TRUNCATED = 10


def one_case(path: Path) -> str:
    """Read one file as ingest would; return the verdict. Anything raised is a finding."""
    try:
        return READERS[reader_of(path)](path)
    except Unusable as verdict:
        return verdict.reason
    except MedvaeError:
        return "refused in one sentence"


def reader_of(path: Path) -> str:
    """Return the reader that ingest would choose by the name."""
    if is_packed(path):
        return "archive"
    return next((reader for reader, ends in ENDS.items() if path.name.endswith(ends)), "DICOM")


def _dicom(path: Path) -> str:
    header = read_header(path, RULES)
    if header.is_segmentation:
        read_mask(path, header.frames, (64, 64, 4), np.eye(4))
    else:
        _both_ways(header.frames[0], read_frames(path, None, RULES))
    return "read"


def _nifti(path: Path) -> str:
    read_nifti(path, None, rules=RULES)
    return "read"


def _npz(path: Path) -> str:
    from medvae.vault.arrays import npz_source

    for scan in npz_source(discover(path), RULES).scans[:4]:
        scan.read()
    return "read"


def _picture(path: Path) -> str:
    read_picture(path, None, rules=RULES)
    return "read"


def _itk(path: Path) -> str:
    count_frames(path)
    read_itk(path, None, rules=RULES)
    return "read"


def _both_ways(frame: Frame, whole: list[FloatArray]) -> None:
    if frame.plain is None:
        return
    short = read_plain(frame.file, frame.offset, frame.rows, frame.columns, frame.plain)
    if short is None or not np.array_equal(short, whole[0], equal_nan=True):
        raise RuntimeError("the short way to plain pixels is not the whole way")


def _archive(path: Path) -> str:
    room = path.parent / "room"
    inside = room / "inside"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    try:
        unpack(path, inside, 2**26, Skipped(), path.name)
    finally:
        links = [p for p in room.rglob("*") if p.is_symlink()]
        if links or any(p != inside for p in room.iterdir()):
            raise RuntimeError("something was written outside the folder")
    return "unpacked"


READERS = {"archive": _archive, "NIfTI": _nifti, "npz": _npz, "picture": _picture, "ITK": _itk, "DICOM": _dicom}
ENDS = {
    "NIfTI": (".nii", ".nii.gz"),
    "npz": (".npz",),
    "picture": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
    "ITK": (".nrrd", ".mha"),
}


def truncations(seeds: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in sorted(seeds, key=lambda p: p.stat().st_size)[:TRUNCATED]:
        data = path.read_bytes()
        for length in range(len(data)):
            yield path.name, data[:length]


def mutations(seeds: list[Path], seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    while True:
        path = rng.choice(seeds)
        data = bytearray(path.read_bytes())
        reach = len(data) if rng.random() < 0.3 else min(len(data), 2500)
        for _ in range(rng.choice((1, 1, 2, 4, 16)) if data else 0):
            at = rng.randrange(min(reach, len(data)))
            kind = rng.random()
            if kind < 0.5:
                data[at] = rng.randrange(256)
            elif kind < 0.7:
                data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80"))
            elif kind < 0.85:
                source, size = rng.randrange(len(data)), rng.randrange(1, 64)
                data[at : at + size] = data[source : source + size]
            else:
                del data[at : at + rng.randrange(1, 32)]
        yield path.name, bytes(data)


def serve(pipe: Connection) -> None:
    """Read the cases that come through the pipe, under a bound on memory and time."""
    import warnings

    warnings.simplefilter("ignore")
    _warm()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, quiet():
        while (case := pipe.recv()) is not None:
            name, data = case
            path = Path(folder) / name
            path.write_bytes(data)
            signal.alarm(SLOWEST)
            try:
                pipe.send((True, one_case(path)))
            except BaseException as error:
                pipe.send((False, f"{type(error).__name__}: {error}"[:300]))
            finally:
                signal.alarm(0)
            path.unlink()
    close()


def _warm() -> None:
    import nibabel  # noqa: F401
    import pydicom.pixels  # noqa: F401


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError("slower than the bound")


class Child:
    """A process that reads cases; made anew when it dies."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, case: tuple[str, bytes]) -> tuple[bool, str]:
        try:
            self.pipe.send(case)
            if not self.pipe.poll(SLOWEST + 60):
                self.process.kill()
                raise EOFError
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.start()
            return False, f"the process died with code {code}"


def run(cases: Iterator[tuple[str, bytes]], seconds: float, keep: Path) -> int:
    verdicts: Counter[str] = Counter()
    readers: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    child, start = Child(), time.monotonic()
    for count, case in enumerate(cases, start=1):
        fine, words = child.read(case)
        readers[reader_of(Path(case[0]))] += 1
        if fine:
            verdicts[words] += 1
        else:
            findings[words] += 1
            if findings[words] <= 3:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{count}-{case[0]}").write_bytes(case[1])
                print(f"finding in case {count}: {words}", flush=True)
        if count % 2000 == 0:
            print(f"{count} cases, {time.monotonic() - start:.0f} s, {sum(findings.values())} findings", flush=True)
        if time.monotonic() - start > seconds:
            break
    child.pipe.send(None)
    child.process.join(30)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{count} cases in {time.monotonic() - start:.0f} s, {sum(findings.values())} findings, peak {peak:.0f} MB")
    print(*(f"{reader}: {number}" for reader, number in readers.most_common()), sep=", ")
    for words, number in (*verdicts.most_common(), *findings.most_common()):
        print(f"{number:>8}  {words}")
    return min(1, len(findings))


def coverage_guided(seeds: Path, seconds: float, keep: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["pydicom"]):
        import pydicom.dataset
        import pydicom.filereader
        import pydicom.pixels  # noqa: F401
    atheris.instrument_func(one_case)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    silence = quiet()
    silence.__enter__()

    def case(data: bytes) -> None:
        path = folder / "case.dcm"
        path.write_bytes(data)
        one_case(path)

    corpus = folder / "corpus"
    shutil.copytree(seeds, corpus)
    keep.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds:.0f}", f"-timeout={SLOWEST}", "-rss_limit_mb=3072", "-max_len=20000"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={keep}/", *limits], case)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("truncate", "mutate", "atheris"))
    parser.add_argument("seeds", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    if args.way == "atheris":
        coverage_guided(args.seeds, args.seconds, args.keep)
    paths = [p for p in sorted(args.seeds.rglob("*")) if p.is_file() and p.stat().st_size <= LARGEST_SEED]
    cases = truncations(paths) if args.way == "truncate" else mutations(paths, args.seed)
    sys.exit(run(cases, args.seconds, args.keep))


if __name__ == "__main__":
    main()
