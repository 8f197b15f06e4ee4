"""Private training: closed-form moments, per-patient clipped gradients, checkpoints, resume."""
