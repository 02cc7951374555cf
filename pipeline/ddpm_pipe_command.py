"""The first module of the `ddpm-pipe` command, installed at the top level under a name that no file of a user's has.

Folders of PYTHONPATH come before the installed packages: a pipeline.py or click.py in one of them would replace ours. So they are moved to
the end.
"""

import os
import sys


def main() -> None:
    """Run the command line and exit."""
    named = {os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    late = [folder for folder in sys.path if os.path.abspath(folder) in named]
    sys.path[:] = [folder for folder in sys.path if folder not in late] + late
    from pipeline.cli import main as run

    run()
