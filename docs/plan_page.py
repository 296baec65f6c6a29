"""Print the example page of docs/understand/plan.md anew: a plan of the model in the package for rows of GSM8K.

    python -m docs.plan_page ROWS.jsonl

Without rows, the 640 of GSM8K inside the package are planned. Writes between the two marks in docs/understand/plan.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from lightning_lora.cli.embedded import MODEL, TRAIN

PAGE = Path(__file__).parent / "understand" / "plan.md"
BEGIN, END = "<!-- printed by python -m docs.plan_page -->\n", "<!-- end of the page -->\n"


def printed(rows: str | Path = TRAIN) -> str:
    """The page that ``lightning-lora plan`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_lora", "plan", MODEL.name, str(Path(rows).absolute())]
        # Beside the model, so that the page names it as anybody would.
        done = subprocess.run(
            [*command, "--json", f"{folder}/plan.json"], cwd=MODEL.parent, check=True, stdout=subprocess.PIPE, text=True
        )
    return done.stdout.partition("written: ")[0]


def main() -> None:
    """Replace the page in docs/understand/plan.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page = printed(*sys.argv[1:2])
    PAGE.write_text(f"{before}{BEGIN}```text\n{page}```\n{END}{after}")


if __name__ == "__main__":
    main()
