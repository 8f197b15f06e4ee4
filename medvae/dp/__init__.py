"""Privacy arithmetic with no torch: plan, calibration, accounting, trade-off curve, ledger, randomness."""
