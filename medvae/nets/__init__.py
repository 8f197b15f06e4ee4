"""Conditional VAEs in 2D and 3D on MONAI blocks, their priors and per-sample losses."""
