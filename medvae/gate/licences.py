"""Under which licence a release is given: an SPDX identifier we know, or the data holder's own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medvae.errors import ConfigError

DEFAULT = "CC-BY-4.0"
_CC = "https://creativecommons.org"
_ATTRIBUTE = "provided you give credit, link to the licence and say what you changed"
_KNOWN = {
    "CC-BY-4.0": ("Creative Commons Attribution 4.0 International", f"{_CC}/licenses/by/4.0/", _ATTRIBUTE),
    "CC-BY-SA-4.0": (
        "Creative Commons Attribution-ShareAlike 4.0 International",
        f"{_CC}/licenses/by-sa/4.0/",
        f"{_ATTRIBUTE}, and pass on what you make of it under the same licence",
    ),
    "CC-BY-NC-4.0": (
        "Creative Commons Attribution-NonCommercial 4.0 International",
        f"{_CC}/licenses/by-nc/4.0/",
        f"{_ATTRIBUTE}, and for non-commercial purposes only",
    ),
    "CC-BY-NC-SA-4.0": (
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
        f"{_CC}/licenses/by-nc-sa/4.0/",
        f"{_ATTRIBUTE}, for non-commercial purposes only, and pass on what you make of it under the same licence",
    ),
    "CC0-1.0": ("CC0 1.0 Universal", f"{_CC}/publicdomain/zero/1.0/", "without any condition"),
    "ODC-By-1.0": (
        "Open Data Commons Attribution License 1.0",
        "https://opendatacommons.org/licenses/by/1-0/",
        _ATTRIBUTE,
    ),
    "ODbL-1.0": (
        "Open Data Commons Open Database License 1.0",
        "https://opendatacommons.org/licenses/odbl/1-0/",
        f"{_ATTRIBUTE}, and pass on databases made of it under the same licence",
    ),
}
NAMES = tuple(_KNOWN)
_OWN = "LicenseRef-data-holder"
_LONGEST = 100_000  # characters of a licence of one's own


@dataclass(frozen=True)
class Licence:
    """identifier: SPDX; text: what stands in LICENSE below the copyright line; url: None for a text of one's own."""

    identifier: str
    text: str
    url: str | None

    @property
    def hub_name(self) -> str:
        """The name Hugging Face's dataset cards use."""
        return "other" if self.url is None else self.identifier.lower()

    @property
    def address(self) -> str:
        """Where the terms stand: their web page, or the file beside the data."""
        return self.url or "./LICENSE"


def licence_of(asked: str) -> Licence:
    """Return a known licence by its SPDX identifier, or one's own from a text file.

    Raises ConfigError where `asked` is neither.
    """
    known = {name.lower(): name for name in NAMES}.get(asked.strip().lower())
    if known is not None:
        name, url, terms = _KNOWN[known]
        return Licence(known, _grant(known, name, url, terms), url)
    try:
        text = Path(asked).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, ValueError):
        text = ""
    if not text or len(text) > _LONGEST:
        raise ConfigError(f"the licence is not known: use one of {', '.join(NAMES)}, or a text file of your own")
    return Licence(_OWN, text, None)


def _grant(identifier: str, name: str, url: str, terms: str) -> str:
    code = f"{url}legalcode" if url.startswith(_CC) else url
    return (
        f"This dataset is licensed under: {name} ({identifier}).\nThe full text is at {code}\n\n"
        f"You may share and adapt the material, {terms}.\n"
        "The material is offered as it is, without warranty. The licence covers this synthetic dataset only and\n"
        "grants no right to any patient's scan. Please do not use it to try to identify a person."
    )
