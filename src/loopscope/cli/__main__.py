"""`python -m loopscope.cli`: the same as the program `loopscope`."""

from loopscope.cli import main

main(prog_name="loopscope")
