"""Where a PACS is and how to talk to it: DICOMweb over TLS, or the DICOM protocol itself.

Secrets come from the environment and stay in memory: MEDVAE_DICOMWEB_TOKEN (a bearer token), or MEDVAE_DICOMWEB_USER
and MEDVAE_DICOMWEB_PASSWORD. They are never taken from an address, which ends up in shell histories, and never put into
a message, a log or a report. REQUESTS_CA_BUNDLE may name the hospital's own certificate authority.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from medvae.errors import ConfigError, InputError, MissingPart

TOKEN, USER, PASSWORD = "MEDVAE_DICOMWEB_TOKEN", "MEDVAE_DICOMWEB_USER", "MEDVAE_DICOMWEB_PASSWORD"
PLAIN_HTTP = "MEDVAE_DICOMWEB_PLAIN_HTTP"
AE_TITLE = "MEDVAE"
TIMEOUT = (20.0, 300.0)  # seconds to connect, and between two bytes: an archive may fetch from tape
LONGEST_ANSWER = 2**27  # bytes of an answer that is held whole, which scans are not; a page of a search has far fewer
FOREIGN = (ValueError, LookupError, TypeError, AttributeError)  # what answers of another form lead to
_SCHEMES = ("dicomweb", "dicomweb+http", "dicom")
_EXAMPLES = "dicomweb://pacs.example/dicom-web or dicom://AETITLE@pacs.example:104"
_AE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?")  # 16 characters without backslash, PS3.5 6.2


@dataclass(frozen=True)
class DicomWeb:
    """A DICOMweb service; `url` is its root over http or https, `query` the search that the address asks for."""

    url: str
    query: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Dimse:
    """An application entity that takes C-STORE."""

    title: str
    host: str
    port: int


def is_address(text: str) -> bool:
    """Whether `text` names a PACS, and not a file or folder."""
    return text.split("://")[0] in _SCHEMES and "://" in text


def parse(address: str) -> DicomWeb | Dimse:
    """Read dicomweb://host[:port]/path[?Modality=MR], dicomweb+http://... or dicom://AETITLE@host:port.

    dicomweb means https. Plain http is for this machine alone, unless MEDVAE_DICOMWEB_PLAIN_HTTP=allow says that
    something else protects the way. Raises ConfigError, without repeating the address.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise ConfigError(f"the address of the PACS cannot be read: write it like {_EXAMPLES}") from None
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.fragment:
        raise ConfigError(f"the address of the PACS cannot be read: write it like {_EXAMPLES}")
    if parts.scheme == "dicom":
        return _dimse(parts.username, parts.password, parts.hostname, port, parts.path + parts.query)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"the address of the PACS holds a login: give it by {TOKEN}, or {USER} and {PASSWORD}")
    plain = parts.scheme == "dicomweb+http"
    if plain and not _loopback(parts.hostname) and os.environ.get(PLAIN_HTTP) != "allow":
        raise ConfigError(
            "dicomweb+http sends scans and tokens in clear, and this is another machine: use dicomweb:// (https), or "
            f"set {PLAIN_HTTP}=allow where something else protects the way"
        )
    root = f"{'http' if plain else 'https'}://{parts.netloc}{parts.path.rstrip('/')}"
    return DicomWeb(root, tuple(parse_qsl(parts.query, keep_blank_values=True)))


def _dimse(title: str | None, password: str | None, host: str, port: int | None, rest: str) -> Dimse:
    if not title or not _AE.fullmatch(title) or password is not None or port is None or rest.strip("/"):
        raise ConfigError("write the address of a DICOM node like dicom://AETITLE@pacs.example:104")
    return Dimse(title, host, port)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def web_client(place: DicomWeb, session: Any = None) -> Any:
    """Return a dicomweb_client.DICOMwebClient over `web_session(place)`, or over the one that is given.

    Raises as `web_session` does.
    """
    session = session or web_session(place)
    from dicomweb_client.api import DICOMwebClient

    with talking():
        client = DICOMwebClient(place.url, session=session, timeout=TIMEOUT)
        # A short wait for a busy server; after that, the same command goes on where it stopped.
        client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=200)
    return client


def web_session(place: DicomWeb) -> Any:
    """Return a requests.Session with the secrets of the environment; redirects are not followed.

    An answer that is not streamed and longer than LONGEST_ANSWER raises InputError, as a packed one does: the few bytes
    of a bomb could fill the memory. Raises MissingPart where the extra `pacs` is not installed.
    """
    try:
        import dicomweb_client  # noqa: F401
        import requests
    except ImportError:
        raise MissingPart("talking to a PACS needs more packages: pip install 'medvae-dp[pacs]'") from None
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    session.hooks["response"].append(_bounded)
    session.max_redirects = 0  # a token goes to the host that was named, and to no other
    session.trust_env = place.url.startswith("https:")  # in clear, a proxy of the environment would read the token
    token, user, password = ((os.environ.get(name) or "").strip() for name in (TOKEN, USER, PASSWORD))
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"{TOKEN} holds signs that no header can carry: set it again, as one line")
    if token:
        session.auth = lambda request: _bearer(request, token)
    elif user:
        session.auth = (user.encode(), password.encode())
    else:
        session.auth = lambda request: request  # without this, requests would look into ~/.netrc
    return session


def _bearer(request: Any, token: str) -> Any:
    request.headers["Authorization"] = f"Bearer {token}"
    return request


def _bounded(response: Any, **asked: Any) -> None:
    """Hook of requests: whatever reads this answer whole reads no more than LONGEST_ANSWER."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        response.close()
        raise InputError(
            "the PACS packs its answer (Content-Encoding), which was not asked for and may hold a bomb: switch that "
            "off in the web server before it"
        )
    if not asked.get("stream"):
        response.raw = _Bounded(response.raw)


class _Bounded:
    """The body of an answer up to a bound; all else is the body's own."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, *args: Any, **more: Any) -> Iterator[bytes]:
        size = 0
        for piece in self._raw.stream(*args, **more):
            size += len(piece)
            if size > LONGEST_ANSWER:
                self._raw.close()
                raise InputError(
                    f"the PACS sends more than {LONGEST_ANSWER // 2**20} MB where a page of a search was asked for, or "
                    "without an end: check the path of its DICOMweb service, or narrow the search"
                )
            yield piece


@contextmanager
def talking() -> Iterator[None]:
    """Silence the libraries, whose logs quote addresses and identifiers, and put what fails into one sentence.

    Raises InputError for anything the network or the server raises: its kind, never its text.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ConfigError, InputError, MissingPart):
        raise
    except Exception as error:
        from requests import RequestException

        if not isinstance(error, (RequestException, OSError, RuntimeError, *FOREIGN)):
            raise
        raise InputError(_said(error)) from None
    finally:
        logging.disable(before)


def _said(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the PACS refuses the login (HTTP {status}): set {TOKEN}, or {USER} and {PASSWORD}"
    if status is not None:
        return f"the PACS answers HTTP {status}: check the path of its DICOMweb service, and its log"
    kind = type(error).__name__
    if isinstance(error, FOREIGN):
        return f"the PACS's answer cannot be understood ({kind}): check the path of its DICOMweb service"
    if "SSL" in kind:
        return "the PACS's certificate is not trusted here: name its authority by REQUESTS_CA_BUNDLE"
    return f"the PACS cannot be reached or breaks off ({kind}): check host, port and network, and run the command again"
