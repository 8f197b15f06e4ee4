"""Randomness fit for a privacy claim: a ChaCha20 keystream keyed by the operating system.

A guarantee is only as good as its noise. Two attacks are treated here:

- *Predictable noise.* A statistical generator such as Mersenne Twister or Philox can be predicted from its state, and
  a small seed can be searched. The key holds 32 bytes of `os.urandom`; it is never shown, stored, pickled or carried
  into another process, and is replaced by its own stream as it goes (fast key erasure, Bernstein 2017), so that the
  memory of a machine does not tell past noise.
- *Floating-point noise.* Samples of one Gaussian transform reach only some floating-point numbers, and the low bits
  of a noisy value can betray the value under it (Mironov 2012, "On Significance of the Least Significant Bits for
  Differential Privacy"). Each sample is therefore half the sum of four independent Gaussian samples, which makes the
  search for the addends infeasible (Holohan & Braghin 2021, "Secure Random Sampling in Differential Privacy",
  section 4, with n = 2; as in Opacus's secure mode). Add the float64 noise before rounding the sum to float32.

The mathematics still treats the Gaussian as continuous: the rest is an accepted gap, stated in the certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from medvae.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

FloatArray64 = npt.NDArray[np.float64]

FLOATING_POINT = "half the sum of four Box-Muller samples from 53-bit uniforms (Holohan & Braghin 2021)"

_ADDENDS = 4
_CHUNK = 8192  # samples a pass, so that the working set stays in the processor's cache
_REKEY_BYTES = 2**30  # the 32-bit block counter of ChaCha20 would wrap at 2^38
_ZEROS = bytes(8 * _ADDENDS * (_CHUNK + 1))


class NoiseSource(Protocol):
    """Where noise and Poisson draws come from. Only `os_noise()` is fit for a release."""

    @property
    def name(self) -> str:
        """What privacy.json says of it."""

    @property
    def releasable(self) -> bool:
        """Whether a run with this noise may be released."""

    def normal(self, n: int) -> FloatArray64:
        """Return n independent standard normal samples, shape (n,)."""

    def mask(self, n: int, rate: float) -> npt.NDArray[np.bool_]:
        """Return a Poisson draw, shape (n,): each entry is True with probability `rate`, independently."""

    def integers(self, n: int, high: int) -> npt.NDArray[np.int64]:
        """Return n independent integers, uniform on 0..high-1, shape (n,)."""

    def fork(self, label: str) -> NoiseSource:
        """Return an independent source; equal labels of one source give equal streams."""


def os_noise() -> NoiseSource:
    """Return a new source keyed by 32 bytes of the operating system's entropy."""
    return _ChaCha20Noise(os.urandom(32), "os_entropy:chacha20", releasable=True)


def seeded_noise(seed: int) -> NoiseSource:
    """Return a repeatable source for tests. Anyone can repeat it too, so its runs are never releasable."""
    key = hashlib.sha256(b"medvae seeded noise, not private:" + str(int(seed)).encode()).digest()
    return _ChaCha20Noise(key, "seeded", releasable=False)


class _ChaCha20Noise:
    """A keystream and the distributions drawn from it."""

    __slots__ = ("__fork_key", "__name", "__pid", "__releasable", "__stream", "__used")

    def __init__(self, key: bytes, name: str, *, releasable: bool) -> None:
        self.__name = name
        self.__releasable = releasable
        self.__pid = os.getpid()
        self.__fork_key = hmac.digest(key, b"fork", "sha256")
        self.__used = 0
        self.__stream = _keystream(hmac.digest(key, b"stream", "sha256"))

    @property
    def name(self) -> str:
        return self.__name

    @property
    def releasable(self) -> bool:
        return self.__releasable

    def __repr__(self) -> str:
        return f"NoiseSource({self.__name}, state hidden)"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a noise source was about to be pickled: its state would tell the noise; make a new one")

    def fork(self, label: str) -> NoiseSource:
        key = hmac.digest(self.__fork_key, label.encode(), "sha256")
        return _ChaCha20Noise(key, self.__name, releasable=self.__releasable)

    def normal(self, n: int) -> FloatArray64:
        out = np.empty(_size(n), dtype=np.float64)
        for start in range(0, n, _CHUNK):
            self.__fill_normals(out[start : start + _CHUNK])
        out *= _ADDENDS**-0.5
        return out

    def mask(self, n: int, rate: float) -> npt.NDArray[np.bool_]:
        if not 0 <= rate <= 1:
            raise ConfigError(f"the sample rate is {rate}: give a number from 0 to 1")
        limit = np.uint64(int(rate * 2.0**53))  # exact: multiplying by a power of two loses no bit
        out = np.empty(_size(n), dtype=np.bool_)
        for start in range(0, n, _CHUNK):
            part = out[start : start + _CHUNK]
            np.less(self.__words(len(part)) >> np.uint64(11), limit, out=part)
        return out

    def integers(self, n: int, high: int) -> npt.NDArray[np.int64]:
        if not 1 <= high <= 2**62:
            raise ConfigError(f"the upper bound is {high}: give a whole number from 1 to 2^62")
        top = np.uint64(2**64 - 1 - 2**64 % high)  # the words up to here fall evenly on 0..high-1
        out = np.empty(_size(n), dtype=np.int64)
        filled = 0
        while filled < n:
            words = self.__words(min(_CHUNK, n - filled))
            kept = words[words <= top] % np.uint64(high)
            out[filled : filled + len(kept)] = kept
            filled += len(kept)
        return out

    def __fill_normals(self, out: FloatArray64) -> None:
        """Fill `out` with sums of four normals, of four different Box-Muller pairs each.

        A pair is r cos 2h and r sin 2h; with t = tan h they are w - r and w t, where w = 2 r / (1 + t^2): one
        vectorised tangent in place of a sine and a cosine, at half the time. All four pairs go through each call
        together, as calls on short arrays cost more than their arithmetic.
        """
        pairs = (len(out) + 1) // 2
        uniforms = self.__uniforms(2 * _ADDENDS * pairs)
        radius, tangent = uniforms.reshape(2, _ADDENDS, pairs)
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        tangent *= np.pi
        np.tan(tangent, out=tangent)
        weight = tangent * tangent
        weight += 1.0
        weight *= 0.5
        np.divide(radius, weight, out=weight)
        tangent *= weight
        weight -= radius
        np.sum(weight, axis=0, out=out[:pairs])
        np.sum(tangent[:, : len(out) - pairs], axis=0, out=out[pairs:])

    def __uniforms(self, n: int) -> FloatArray64:
        """Return n multiples of 2^-53, uniform on (0, 1]."""
        words = self.__words(n) >> np.uint64(11)
        words += np.uint64(1)
        return np.multiply(words.view(np.int64), 2.0**-53)

    def __words(self, n: int) -> npt.NDArray[np.uint64]:
        if os.getpid() != self.__pid:
            raise PrivacyError(
                "a noise source was carried into another process, where it would repeat its noise: make a new one there"
            )
        self.__used += 8 * n
        if self.__used > _REKEY_BYTES:
            self.__stream = _keystream(self.__stream.update(_ZEROS[:32]))
            self.__used = 8 * n
        return np.frombuffer(self.__stream.update(_ZEROS[: 8 * n]), dtype="<u8")


def _keystream(key: bytes) -> CipherContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _size(n: int) -> int:
    if n < 0:
        raise ConfigError(f"{n} samples were asked for: give a number from 0 up")
    return n
