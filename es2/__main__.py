"""`python -m es2`: the command line, for `accelerate launch -m es2 …` and for jobs."""

from es2.cli.main import main

main()
