"""The one writer of release folders: checks, manifest, certificate, signature, verification."""
