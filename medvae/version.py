"""The version, in a module of its own: a room that imported it from `medvae` would reach the commands, and all rooms."""

__version__ = "0.1.0"
