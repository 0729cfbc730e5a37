"""Puts torchrun on a lifeline (`parallel/engine/lifeline.py`) of the supervisor.

    python -m gptoss_launch.launch.lifeline CONTROL_SOCKET torch.distributed.run ARGUMENTS...

runs a module that knows nothing of us as a process that ends with the command. Ranks and
the HTTP process hold lifelines of their own.
"""

import runpy
import sys
from pathlib import Path

from ..parallel.engine.lifeline import hold


def main() -> None:
    control, module, *arguments = sys.argv[1:]
    hold(Path(control), role="torchrun")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
