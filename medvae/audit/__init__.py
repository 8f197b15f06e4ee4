"""Everything that scores a model against real data: fidelity, utility, attacks."""
