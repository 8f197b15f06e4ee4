"""The version, in a module of its own: a room that took it from `medvae` would reach the commands, and so all rooms."""

__version__ = "0.1.0"
