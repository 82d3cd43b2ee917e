"""`python -m selectra` is the command `selectra`."""

from selectra.cli import main

main()
