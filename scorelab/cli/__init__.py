"""The command line."""

from __future__ import annotations

import os

__all__ = ["run"]


def run() -> int:
    """Run one command, with threads that wait for each other in vain for a shorter time than PyTorch's do by default.

    Beside another busy process a thread that waits takes from the one it waits for, and training falls to a tenth; a
    thirtieth of the usual spins is 2 % slower alone (docs/measured.md). What the user has set stands.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
    from scorelab.cli.main import main

    return main()
