"""Options that several commands share. None has a default here: those live in the config models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool | None, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Quiet = Annotated[bool | None, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Epsilon = Annotated[
    float | None,
    typer.Option("--dp-epsilon", metavar="EPSILON", help="Privacy budget of the run; 'inf' for a comparison."),
]
Advantage = Annotated[
    float | None,
    typer.Option(metavar="A", help="Instead of epsilon: the largest TPR - FPR of any membership attack."),
]
Risk = Annotated[
    float | None,
    typer.Option(metavar="R", help="Instead of epsilon: how often any attacker may be right about a patient."),
]
Baseline = Annotated[
    float | None, typer.Option(metavar="K", help="With --max-reid-risk: how often a blind guess is right anyway.")
]
Delta = Annotated[
    float | None, typer.Option("--dp-delta", metavar="DELTA", help="Default: min(1e-5, 1/(n ln n)) for n patients.")
]
Pipeline = Annotated[Path | None, typer.Option("--pipeline", metavar="FILE.yaml", help="A recipe; see pipelines/.")]
Resume = Annotated[bool | None, typer.Option("--resume", help="Go on with an interrupted run; never charged twice.")]
PublicKey = Annotated[
    Path | None, typer.Option(metavar="FILE.pem", help="The signer's Ed25519 public key (PEM), if you know it.")
]
Memory = Annotated[
    float | None, typer.Option(metavar="GIB", help="Memory that training may take; batches are split to keep it.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Fixes what is not privacy: splits, initialisation, samples.")
]
