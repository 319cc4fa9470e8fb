"""`python -m flagdit.cli`, as launchers start it."""

from flagdit.cli import main

main()
