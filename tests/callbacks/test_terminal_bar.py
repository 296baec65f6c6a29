"""The progress display on a pseudo-terminal, in a process of its own."""

from __future__ import annotations

import os
import re
import select
import sys
import textwrap

import pytest

from tests.support import warm

SCRIPT = """
    import sys, time, warnings
    warnings.simplefilter("ignore")
    from tests.callbacks.test_progress import TinyWithValidation, batches, fit
    from lightning_lora.callbacks.progress import LoRAProgressBar
    class Slow(TinyWithValidation):
        def training_step(self, batch, batch_idx):
            time.sleep(0.1)
            self.log("mine", 3.0, prog_bar=True)
            return super().training_step(batch, batch_idx)
    bar = LoRAProgressBar(every_n_steps=1)
    fit(Slow(), bar, val=batches(1))
    print("plain:", bar.plain)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
@pytest.mark.parametrize("variable", ["", "NO_COLOR=1", "TERM=dumb"])
def test_a_bar_on_a_terminal(variable: str) -> None:
    import pty

    name, _, value = variable.partition("=")
    environment = {key: text for key, text in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "200"} | ({name: value} if name else {})
    controller, terminal = pty.openpty()
    process = warm.Process(
        "-c", textwrap.dedent(SCRIPT), env=environment, stdout=os.ttyname(terminal), stderr=os.devnull
    )
    chunks = []
    while process.poll() is None or select.select([controller], [], [], 0)[0]:
        if select.select([controller], [], [], 0.1)[0]:
            chunks.append(os.read(controller, 65536))
    os.close(controller)
    os.close(terminal)
    assert process.wait() == 0
    out = b"".join(chunks).decode()
    if name == "TERM":
        assert "plain: True" in out
        assert "\x1b" not in out
        return
    assert "plain: False" in out
    assert "validation at" not in out
    assert re.search(r"loss: \d+ lr: 0\.25 rows/s: [\d,.]+ memory: [\d,]+ MB mine: 3\.000", out)
    assert ("\x1b[38;" in out or "\x1b[3;" in out) != (name == "NO_COLOR")
