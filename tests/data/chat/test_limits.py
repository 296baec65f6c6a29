"""A chat template is a program of a stranger: it ends, makes no huge text and sees plain values only."""

from __future__ import annotations

import time

import pytest

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import tiny_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
RUNAWAY = {
    "loops": (ENDLESS, "has not ended after 1.1 s"),
    "loops on a row": (
        "{% for m in messages %}{% if m.content == 'five' %}" + ENDLESS + "{% endif %}{% endfor %}",
        "ended",
    ),
    "a product": ("{% for m in messages %}{{ m.content * 1000000000 }}{% endfor %}", "makes a text of .* characters"),
    "a constant": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' * 30000000 }}",
        "text of 300000.. characters",
    ),
    "nested": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply"),
}


@pytest.mark.parametrize("case", RUNAWAY)
def test_a_template_without_end_is_refused_in_seconds(case: str, write: Write) -> None:
    """B83."""
    template, message = RUNAWAY[case]
    rows = [{"messages": [{"role": "user", "content": "five"}, {"role": "assistant", "content": "five"}]}] * 3
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(write("a.jsonl", rows), tokenizer=tiny_tokenizer(template), on_bad_row="skip").setup()
    assert time.process_time() - start < 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_a_template_that_looks_behind_its_values_is_refused(attack: str, write: Write) -> None:
    """B83."""
    rows = [{"messages": [{"role": "user", "content": "five"}, {"role": "assistant", "content": "five"}]}]
    with pytest.raises(DataError, match=r"row 0 .*access to attribute '__class__' .* is unsafe"):
        SFTDataModule(write("a.jsonl", rows), tokenizer=tiny_tokenizer(attack)).setup()
