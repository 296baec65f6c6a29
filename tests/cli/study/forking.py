"""``lightning-lora`` whose study forks its runs from itself: a server would import everything once more."""

import sys

from lightning_lora.cli.main import main
from lightning_lora.cli.study import processes

processes.START = "fork"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
