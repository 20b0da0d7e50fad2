import sys

from scorelab.cli import run

sys.exit(run())
