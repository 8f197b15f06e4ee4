"""What a run writes into the ledger's notes beside its charge, so that nothing of it can be exchanged afterwards.

At its start: where its noise comes from, how many patients it trains on, and the digest of the canaries' coins. At its
end: the digest of the weights, and that of what the canaries saw. The ledger is append-only and chained, so the gate
can hold a run's files against it.
"""

from __future__ import annotations

CANARIES, NOISE, PATIENTS, WEIGHTS = "canaries", "noise", "patients", "weights"
_BETWEEN = "; "


def start_note(recipe: str, noise: str, patients: int, coins: str | None) -> str:
    """Return the note of a reservation; coins: the digest of the commitment, or None without canaries."""
    facts = [f"train {recipe}", f"{NOISE} {noise}", f"{PATIENTS} {patients}"]
    return _BETWEEN.join([*facts, *([f"{CANARIES} {coins}"] if coins else [])])


def end_note(weights: str, seen: str | None) -> str:
    """Return the note of a run's end; seen: the digest of what the canaries saw, or None without canaries."""
    return _BETWEEN.join([f"{WEIGHTS} {weights}", *([f"{CANARIES} {seen}"] if seen else [])])


def marks(note: str) -> dict[str, str]:
    """Return what a note names, by its first word. A recipe's name comes first and cannot stand in for a later mark."""
    return {word: rest for word, _, rest in (part.partition(" ") for part in note.split(_BETWEEN))}
