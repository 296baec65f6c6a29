"""Run the command ``lightning-lora`` as ``python -m lightning_lora``."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
