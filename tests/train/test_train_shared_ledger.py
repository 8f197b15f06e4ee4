"""A run charged to a shared ledger: the same command, the gate finds it again, and the address is nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from postgres_server import PASSWORD, Server
from small_cohort import small_config, write_cohort

from medvae import api
from medvae.dp.ledger_place import ADDRESS
from medvae.errors import ConfigError, PrivacyError, RunError
from medvae.gate.evidence import read_evidence


def test_the_address_of_a_shared_ledger_is_in_no_byte(
    tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = postgres.url(postgres.new_database())
    monkeypatch.setenv(ADDRESS, url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    cohort, run = write_cohort(tmp_path / "cohort"), tmp_path / "run"
    claim = api.train(cohort, run, small_config(), budget=10.0)
    shown = api.ledger(cohort)
    assert shown["spent"] == pytest.approx(claim["epsilon"], abs=1e-3)
    assert not (cohort / "ledger.db").exists()

    spending = read_evidence(run, json.loads((run / "privacy.json").read_text()), None).spending
    assert [e.kind for e in spending.entries] == ["create", "budget", "reserve", "commit"]
    monkeypatch.delenv(ADDRESS)
    with pytest.raises(ConfigError, match="set MEDVAE_LEDGER"):
        read_evidence(run, claim, None)
    with pytest.raises(PrivacyError, match="a shared one"):
        api.train(cohort, tmp_path / "next", small_config())
    assert not (tmp_path / "next").exists()

    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"privacy.json", "run.json", "mlflow.db", "ledger.id"} <= {p.name for p in written}
    for secret in (PASSWORD, f"127.0.0.1:{postgres.port}", "postgresql://"):
        assert not [p.name for p in written if secret.encode() in p.read_bytes()]
    assert PASSWORD not in "".join(capfd.readouterr())


def test_a_run_whose_ledger_went_away_refuses_and_goes_on_later(
    tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvae.train.run import train

    own = Server(postgres.programs)
    try:
        monkeypatch.setenv(ADDRESS, own.url())
        cohort, run = write_cohort(tmp_path / "cohort"), tmp_path / "run"

        def away(step: int, _stats: object) -> None:
            if step == 3:
                own.stop()

        with pytest.raises(RunError, match="the connection was lost"):
            train(cohort, run, small_config(), on_step=away)  # the end is what needs the ledger
        assert not (run / "privacy.json").exists()
        with pytest.raises(RunError, match="cannot be reached"):
            train(cohort, tmp_path / "next", small_config())
        assert not (tmp_path / "next").exists()
        own.start()
        claim = train(cohort, run, small_config(), resume=True)
        assert claim["receipt"]["sequence"] == 2
    finally:
        own.remove()
