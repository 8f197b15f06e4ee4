"""What standards and laws ask of such a release, and which evidence here speaks to it: evidence, never determination.

ISO/IEC 27559:2022 by its clauses; NIST SP 800-226 (2025) by the layers of its pyramid; and four legal frames. In
braces stand facts of the report, filled in by `table`.
"""

from __future__ import annotations

from collections.abc import Mapping

Row = tuple[str, str, str]

ISO_27559: tuple[Row, ...] = (
    ("6.2 Threat modelling", "Who may attack, with what knowledge and motive",
     "The proof assumes the strongest attacker: all other patients' scans known, the model in hand, any computing "
     "power. The attacks tested are listed under D; an agreement with recipients is the institution's part."),
    ("6.3 Transparency and impact assessment", "What is told to whom; harm to the people concerned",
     "This report, its public version and the certificate. Harm to patients is for the board to weigh: not assessed "
     "here."),
    ("7.2 Data features", "Data principals, types of data, attributes",
     "{patients} patients, the unit of protection; images and the conditions declared public. No other tag is read."),
    ("7.3 Attack modelling", "Maximum or average risk, population or sample attack, privacy model",
     "Differential privacy bounds the maximum risk over patients. Measured attacks give averages, the worst subgroup "
     "and rates at few wrong accusations."),
    ("8.2 Assessing identifiability", "Quantified identifiability; adversarial testing",
     "Epsilon {epsilon} at delta {delta}; proven limits for each of the three risks; tests: {tested}."),
    ("8.3 Mitigation", "Changing the data or the environment; re-evaluation",
     "Training with calibrated noise, a gate before release, a ledger over all runs. Review is due on {review}."),
    ("9.2 Before data are made available", "Roles, principles, the disclosure itself, stakeholders",
     "Signatures on page 2. {budget} Consultation of patients is the institution's part."),
    ("9.3 After data are made available", "Monitoring of the environment",
     "Anyone can run `medvae verify`. Each further release is added to the ledger. Watching recipients is the "
     "institution's part."),
    ("9.4 Mitigation in case of incident", "What happens when something goes wrong",
     "Synthetic data cannot be called back: the institution's plan applies. Nothing here replaces it."),
)  # fmt: skip

NIST_800_226: tuple[Row, ...] = (
    ("Guarantee: epsilon and delta", "How strong the promise is",
     "Epsilon {epsilon} at delta {delta}, with the whole trade-off curve and what it means for an attacker in words."),
    ("Guarantee: unit of privacy", "Who is protected as one",
     "One patient with all scans; add-remove neighbours. A person filed under two identifiers counts as two."),
    ("Algorithms: utility", "Whether the result is of use",
     "Fidelity and utility findings, each beside real data (F)."),
    ("Algorithms: bias", "Who is served worse",
     "Noise costs small groups most: {subgroup} Compare the findings by condition before use."),
    ("Deployment: correct implementation", "Whether the programme does what the proof assumes",
     "Canary audit: {canary}. Epsilon by two accountants. {fault}"),
    ("Deployment: floating point and randomness", "Known gaps between mathematics and machines",
     "{noise} Attacks on the last bits of floating-point noise are not excluded by the proof."),
    ("Deployment: side channels", "Time, memory, logs, error messages",
     "Losses, norms and batch sizes stay in the run's private folder; messages name no patient or path. The time a "
     "training takes is not hidden."),
    ("Deployment: trust model, access and collection", "Who sees the raw data",
     "Central: the institution trains on its own machine and is trusted with the scans. Guarding them is its part."),
)  # fmt: skip

CROSSWALK: tuple[Row, ...] = (
    ("HIPAA, 45 CFR 164.514(b)(1)", "An expert determines that the risk of identification is very small",
     "Methods and results an expert can use: proof, attacks, intervals, and what was not tested. The determination is "
     "the expert's and is not made here."),
    ("EDPB Opinion 28/2024; Article 29 WP Opinion 05/2014", "Likelihood of singling out, linking and inference from "
     "the model, by all means reasonably likely to be used",
     "The table of three risks, with a proven limit for each. Whether the model or the scans are anonymous is for the "
     "controller to assess."),
    ("EHDS, Regulation (EU) 2025/327", "Data minimisation and anonymised output in secondary use",
     "The certificate and this report may accompany a request. Approval is the health data access body's."),
    ("EMA Policy 0070", "A reasoned risk of re-identification, with 0.09 as the usual threshold",
     "A blind guess right 1 time in 100 is right at most {limit} of the time. `--max-reid-risk 0.09 --baseline K` "
     "trains to such a threshold. Whether the reasoning suffices is the agency's to say."),
)  # fmt: skip


def table(rows: tuple[Row, ...], facts: Mapping[str, str]) -> list[Row]:
    """Fill the facts of one report into a table."""
    return [(clause, asks, evidence.format_map(facts)) for clause, asks, evidence in rows]
