"""The commands of ``lightning-lora``.

Read in this order: `main` (which command), `commands` (what each beside ``fit`` takes), `parser` and `probe` (on
LightningCLI), `demo` and `demo_arm`, `export`, `inspection` and `inspection_table`, `quiet` (the libraries below us).
"""
