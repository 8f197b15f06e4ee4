"""`medvae --help` answers at once because nothing heavy is imported; and rooms named like commands stay callable."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import medvae
import medvae.audit
import medvae.demo
import medvae.doctor
import medvae.train

HEAVY = {
    "torch", "numpy", "scipy", "monai", "opacus", "mlflow", "pydicom", "nibabel", "highdicom", "matplotlib", "skimage",
    "sklearn", "sqlalchemy", "pandas", "weasyprint", "jinja2", "dp_accounting", "cryptography", "yaml", "PIL",
}  # fmt: skip


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import medvae",
        "from medvae.cli_run import run; assert run(['--help']) == 0",
        "from medvae.cli_run import run; assert run(['train', '--help']) == 0",
        "from medvae.cli_run import run; assert run(['--version']) == 0",
    ],
)
def test_help_imports_nothing_heavy(code: str) -> None:
    assert not _modules_after(code) & HEAVY


def test_the_check_on_imports_can_fail() -> None:
    assert "numpy" in _modules_after("import medvae.types") & HEAVY


def test_help_loads_no_config_of_ours() -> None:
    code = "from medvae.cli_run import run; run(['--help']); assert 'medvae.config' not in sys.modules, 'config'"
    _modules_after(code)


def test_every_public_name_is_there() -> None:
    for name in medvae.__all__:
        assert getattr(medvae, name) is not None


@pytest.mark.parametrize("name", ["train", "audit", "demo", "doctor"])
def test_a_room_named_like_a_command_can_be_called(name: str) -> None:
    from medvae import api

    room = getattr(medvae, name)
    assert inspect.ismodule(room)
    assert callable(room)
    assert inspect.signature(room) == inspect.signature(getattr(api, name))


def test_calling_a_room_calls_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from medvae import api

    monkeypatch.setattr(api, "doctor", lambda: {"called": True})
    assert medvae.doctor() == {"called": True}  # type: ignore[operator]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medvae.nothing
