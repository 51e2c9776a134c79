"""The program `loopscope`. One file a command; frameworks are imported late."""

from __future__ import annotations

import click

from loopscope.cli.compare import compare
from loopscope.cli.diff import diff
from loopscope.cli.doctor import doctor
from loopscope.cli.mnist import mnist
from loopscope.cli.resume import resume
from loopscope.cli.rewind import rewind
from loopscope.cli.runs import runs
from loopscope.cli.train import train
from loopscope.cli.verify import verify
from loopscope.cli.view import view
from loopscope.cli.why import why


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loopscope")
def main() -> None:
    """A training loop for Keras 3 that can be looked into.

    EXPERIMENT is `package.module:function` or `file.py:function`, a function that
    returns a `loopscope.Experiment`; `mnist` names the built-in one.
    """


main.add_command(mnist)
main.add_command(train)
main.add_command(compare)
main.add_command(doctor)
main.add_command(resume)
main.add_command(rewind)
main.add_command(why)
main.add_command(diff)
main.add_command(verify)
main.add_command(runs)
main.add_command(view)
