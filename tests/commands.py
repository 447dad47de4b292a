"""Run several command lines of lightning_grpo in one process: ``python commands.py '[["fit", …], …]'``."""

import json
import sys

from lightning_grpo.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
