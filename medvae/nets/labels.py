"""Labels that some scans lack: the semi-supervised VAE "M2" of Kingma et al. (2014, NeurIPS), section 3.1.2.

A cohort holds a missing label as the class "missing" (`medvae ingest --missing class`). Such a scan is one of its
patient's like any other: its ELBO is averaged over the classes that q(y | x) thinks it may have, and q's entropy is
added (eq. 7). A labelled scan has the ELBO of its class, and trains q by its cross-entropy (eq. 6 and 9). All of it is
one loss a scan, so classifier, encoder and decoder share one gradient a patient, clipped once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medvae.errors import ConfigError
from medvae.types import MISSING_CLASS, Condition


class Labels(nn.Module):
    """q(y | x), a linear layer on the encoder's features, over the classes of one condition but the missing one."""

    column: Tensor

    def __init__(self, features: int, conditions: tuple[Condition, ...]) -> None:
        """Raise ConfigError where no class condition has a class for missing values and two others."""
        super().__init__()
        self.columns, self.missing = _columns(conditions)
        self.logits = nn.Linear(features, len(self.columns))

    @property
    def classes(self) -> int:
        """How many classes a scan may truly have."""
        return len(self.columns)

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return log q(y | x), (B, classes), of the encoder's features (B, F)."""
        return torch.log_softmax(self.logits(features), dim=1)

    def known(self, condition: Tensor) -> Tensor:
        """Return 1 where a scan's label is known, 0 where it is missing, (B,)."""
        return 1 - condition[:, self.missing]

    def given(self, condition: Tensor) -> Tensor:
        """Return the labels that are known, one-hot over the true classes (B, classes); zeros where missing."""
        return condition[:, self.columns]

    def with_probabilities(self, condition: Tensor, probability: Tensor) -> Tensor:
        """Return conditions (B, K) with `probability` (B, classes) in place of the label."""
        filled = torch.zeros_like(condition)
        places = torch.tensor(self.columns, device=condition.device).expand(len(condition), -1)
        filled = filled.scatter(1, places, probability.to(condition.dtype))
        return torch.where(self._mine(condition), filled, condition)

    def completed(self, condition: Tensor, probability: Tensor) -> Tensor:
        """Return conditions in which a missing label, and no other, is `probability` (B, classes)."""
        known = self.known(condition)[:, None]
        return self.with_probabilities(condition, known * self.given(condition) + (1 - known) * probability)

    def even(self, condition: Tensor) -> Tensor:
        """Return conditions in which a missing label is every class in equal parts."""
        return self.completed(condition, torch.full_like(self.given(condition), 1 / self.classes))

    def drawn(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return conditions in which a missing label is one class, drawn evenly."""
        chosen = torch.randint(self.classes, (len(condition),), generator=generator)
        return self.completed(condition, torch.nn.functional.one_hot(chosen, self.classes).to(condition.dtype))

    def loss(self, each: list[Tensor], log_q: Tensor, condition: Tensor, label_weight: float) -> Tensor:
        """Return the loss (B,) in nats from the negative ELBO (B,) of each class, under a uniform p(y).

        log_q: (B, classes), of q(y | x).
        """
        negative_elbo = torch.stack(each, dim=1) + math.log(self.classes)
        given, known = self.given(condition), self.known(condition)
        of_known = (given * (negative_elbo - label_weight * log_q)).sum(1)
        of_missing = (log_q.exp() * (negative_elbo + log_q)).sum(1)
        return known * of_known + (1 - known) * of_missing

    def _mine(self, condition: Tensor) -> Tensor:
        mine = torch.zeros(condition.shape[1], dtype=torch.bool, device=condition.device)
        mine[[*self.columns, self.missing]] = True
        return mine


def _columns(conditions: tuple[Condition, ...]) -> tuple[list[int], int]:
    """Return the columns of the true classes, and of the missing one, of the first condition that has such a class."""
    start = 0
    for condition in conditions:
        if condition.kind == "class" and MISSING_CLASS in condition.classes and condition.width > 2:
            missing = start + condition.classes.index(MISSING_CLASS)
            return [c for c in range(start, start + condition.width) if c != missing], missing
        start += condition.width
    raise ConfigError(
        "semi_supervised needs a condition with missing labels and two classes: ingest with --condition NAME and "
        "--missing class"
    )
