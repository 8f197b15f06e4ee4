"""`python -m medvae` is the `medvae` command."""

from medvae.cli_run import main

main()
