"""`python -m molt`."""

from molt.cli import main

main()
