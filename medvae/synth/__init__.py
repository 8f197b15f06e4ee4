"""Sampling from a released model, writers for NIfTI, DICOM, PNG and npz, and the procedural phantoms."""
