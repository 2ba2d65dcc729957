"""`python -m molt.cli`."""

from molt.cli import main

main()
