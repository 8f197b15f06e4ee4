"""The JSON Schemas of every JSON file that medvae writes, and one way to hold a file against its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from medvae.errors import MedvaeError, RunError


@cache
def load(name: str) -> Mapping[str, Any]:
    """Return the JSON Schema called `name`, such as "certificate"."""
    text = resources.files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    schema: Mapping[str, Any] = json.loads(text)
    return schema


def version(name: str) -> str:
    """Return the version a file of this kind must name in its key "schema", such as "medvae.certificate/1"."""
    return str(load(name)["properties"]["schema"]["const"])


def problem(name: str, data: Any) -> str | None:
    """Return the first breach of the schema in words, or None. The value itself is never repeated."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(load(name)).iter_errors(data))
    if error is None:
        return None
    where = "/".join(str(part) for part in error.absolute_path) or "the top level"
    return f"{where} breaks the rule {error.validator!r} of the schema {version(name)!r}"


def check(name: str, data: Any, error: type[MedvaeError] = RunError) -> None:
    """Raise `error` with one sentence unless `data` keeps to the schema called `name`."""
    found = problem(name, data)
    if found is not None:
        raise error(f"{name}.json is not as it should be: {found}; write it again with this medvae")
