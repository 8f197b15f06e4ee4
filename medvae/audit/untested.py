"""What an audit does not look at: always, and because of what this recipe has beyond what the attacks know."""

from __future__ import annotations

from medvae.config import Recipe

ALWAYS = (
    "attackers who know all other patients' scans: the proof covers them, the attacks know people of the same kind",
    "what several releases of one cohort reveal together: the ledger adds them up, the attacks see one",
    "whether a clinician finds the scans plausible or useful",
)
TEACHER = (
    "the teacher, which is released with the model: attacks see the samples it chose or named, and score none of its "
    "weights; shadow models train none"
)
CODE_PRIOR = (
    "the prior fitted to patients' codes: attacks see the samples drawn from it, and score none of its numbers; shadow "
    "models fit none"
)
PRETRAINING = (
    "pretraining: shadow models start from random weights and not from it, so scores calibrated by them are weaker "
    "than those of an attacker who repeats it"
)
ROBUST = (
    "the second training, on attacked scans: shadow models do without it, so scores calibrated by them are weaker than "
    "those of an attacker who repeats it"
)
LABELS = "the classifier that infers missing labels: scores ask the VAE of a scan with its own label or none"


def untested(recipe: Recipe) -> list[str]:
    """Return one sentence for each thing that an audit of a model of this recipe leaves out. Public."""
    of_recipe = (
        (recipe.teacher.enabled, TEACHER),
        (recipe.prior.kind != "none", CODE_PRIOR),
        (recipe.pretraining.source != "none", PRETRAINING),
        (recipe.robust.enabled, ROBUST),
        (recipe.model.semi_supervised, LABELS),
    )
    return [*(words for has, words in of_recipe if has), *ALWAYS]
