"""python -m edgeslm."""

from edgeslm.cli import main

main()
