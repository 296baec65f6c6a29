"""``python -m lightning_lora`` is ``lightning-lora``."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
