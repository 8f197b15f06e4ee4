"""What README and docs say is so: commands, flags, files, targets, links, tests and figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from medvae.cli import app
from medvae.cli_numbers import join_numbers
from medvae.config import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = {c.name: c for c in typer.main.get_command(app).commands.values()}  # type: ignore[attr-defined]


def _lines(page: Path) -> Iterator[str]:
    """Return the command lines of a page: fenced with a prompt, or `medvae …` in the text."""
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^\$ (medvae .+?)\s*(?:#.*)?$", text, flags=re.M):
        yield line
    for line in re.findall(r"`(medvae [a-z][^`]*)`", text):
        yield line


def _examples() -> list[tuple[str, str]]:
    found = [(page.name, line) for page in PAGES for line in _lines(page)]
    found += [("--help", line) for c in COMMANDS.values() for line in re.findall(r"`(medvae [^`]+)`", c.help or "")]
    return found


@pytest.mark.parametrize(("page", "line"), _examples())
def test_every_command_in_the_docs_exists_with_its_flags(page: str, line: str) -> None:
    line = line.replace("…", "").replace("'sex=F|M'", "sex").replace("sex=F|M", "sex")
    words = join_numbers([w for w in shlex.split(line) if not re.fullmatch(r"[A-Z]+", w)])[1:]
    assert words[0] in COMMANDS, f"{page}: {line}"
    known = {flag for p in COMMANDS[words[0]].params for flag in getattr(p, "opts", [])} | {"--help"}
    used = {w for w in words[1:] if w.startswith("-") and not re.fullmatch(r"-[\d.]+", w)}
    assert used <= known, f"{page}: {line}"


def test_every_command_has_an_example_and_the_common_flags() -> None:
    assert len(COMMANDS) >= 9
    for name, command in COMMANDS.items():
        flags = {flag for p in command.params for flag in getattr(p, "opts", [])}
        assert {"--json", "--quiet"} <= flags, name
        assert f"`medvae {name}" in (command.help or ""), name


def test_every_flag_leaves_its_default_to_the_config() -> None:
    for name, command in COMMANDS.items():
        for p in command.params:
            if p.name != "help":
                assert p.default in (None, ...), f"{name} {p.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert {"demo", "test", "lint", "docs"} <= targets
    for page in PAGES:
        used = set(re.findall(r"(?:^\$ |`)(?:CUDA=1 )?make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.M))
        assert used <= targets, page.name


def test_every_pitfall_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    pitfalls = page.split("\n## ")[1:]
    assert len(pitfalls) >= 12
    for pitfall in pitfalls:
        named = re.findall(r"`(test_\w+)`", pitfall)
        assert named, pitfall.splitlines()[0]
        assert set(named) <= tests, f"{pitfall.splitlines()[0]}: {set(named) - tests}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_named_on_a_page_exist(page: Path) -> None:
    tests = " ".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests, name


def test_the_table_of_epsilons_is_what_the_accountant_says() -> None:
    from scipy.stats import norm

    from medvae.dp.accounting import gaussian_noise_for

    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \|$", page, flags=re.M)
    assert len(rows) >= 5
    for epsilon, advantage, strict, loose in (map(float, row) for row in rows):
        mu = 1 / gaussian_noise_for(epsilon, 1e-5)
        assert 2 * norm.cdf(mu / 2) - 1 == pytest.approx(advantage, abs=0.006)
        for said, fpr in ((strict, 1e-3), (loose, 1e-2)):
            assert 100 * norm.cdf(norm.ppf(fpr) + mu) == pytest.approx(said, rel=0.03)


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda f: f.name)
def test_every_recipe_is_valid_and_named_like_its_file(file: Path) -> None:
    assert load_recipe(file).name == file.stem


def test_the_default_recipe_file_is_the_default() -> None:
    assert load_recipe(ROOT / "pipelines" / "default.yaml") == Recipe()


def test_the_mlflow_folder_cannot_shadow_the_package() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_no_registry_is_named() -> None:
    for name in ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text, name
        assert not re.search(r"index-url|find-links[= ]/", text), name


def test_versions_agree() -> None:
    import medvae

    assert f'version = "{medvae.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"## {medvae.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
