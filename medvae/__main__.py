"""`python -m medvae` is the `medvae` command."""

from medvae.cli import main

main()
