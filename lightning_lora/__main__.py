"""``python -m lightning_lora`` runs ``lightning-lora``."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
