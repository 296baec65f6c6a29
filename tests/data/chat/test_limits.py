"""A chat template is a program of a stranger: it ends, makes no huge text and sees plain values only."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_lora.data import SFTDataModule
from lightning_lora.data.chat import limits
from lightning_lora.data.chat.template import Template
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import tiny_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
RUNAWAY = {
    "loops": (ENDLESS, "has not ended after 1 s with one conversation"),
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
    "calls itself": ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}", "calls itself without end"),
}
SETS = "{% set ns = namespace(x='abcdefgh', l=['a'], n=12345678) %}{% for i in range(60) %}{% set ns."
HUGE = {
    "a constant": "{{ 'a' * 10000000000 }}",
    "doubled by ~": SETS + "x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": SETS + "x = ns.x + ns.x %}{% endfor %}",
    "a list in itself": SETS + "l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "a list in itself as JSON": SETS + "l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson | length }}",
    "a number": SETS + "n = ns.n * ns.n %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a filter": "{{ 'a' | center(3000000000) | length }}",
    "a method": "{{ messages[0].content.ljust(3000000000) | length }}",
    "a width": "{{ '%3000000000d' % 5 }}",
    "a width that is given": "{{ '{:>{}}'.format(5, 3000000000) | length }}",
    "replaced": "{{ ('a' * 100000).replace('a', 'b' * 100000) | length }}",
    "replaced in a list": "{{ ['a' * 100000] | map('replace', 'a', 'b' * 100000) | list | length }}",
    "indented": "{{ ('\n' * 100000) | indent(100000) | length }}",
    "wrapped": "{{ ('a ' * 100000) | wordwrap(1, true, 'b' * 100000) | length }}",
    "joined": "{{ (['a' * 100000] * 100000) | join | length }}",
    "captured": "{% set x = 'abcdefgh' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "of a macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% else %}{{ 'a' * 9000 }}{% endif %}"
    "{% endmacro %}{{ m(30) }}",
    "many captured": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{{ 'a' * 100000 }}{% endcall %}",
    "of a loop": "{% set x = 'a' * 100000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "of a block": "{% block b %}{{ 'a' * 3000000000 }}{% endblock %}",
    "between marks": "{% generation %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endgeneration %}",
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


@pytest.mark.parametrize("case", HUGE)
def test_nothing_in_a_template_grows_beyond_any_conversation(case: str) -> None:
    """B83: one operator or filter can take all memory before anything could stop it."""
    messages = [{"role": "user", "content": "five"}]
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"the chat template (makes a text|computes|has not ended)"):
            Template(HUGE[case]).render_marked(messages)
        assert tracemalloc.get_traced_memory()[1] < 200 * 10**6
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2


def test_every_conversation_has_its_own_time() -> None:
    """Many conversations are rendered in one call, and the last one of them may be without end."""
    endless = "{% if messages[0].content == 'endless' %}" + ENDLESS + "{% endif %}"
    conversations = [[{"role": "user", "content": text}] for text in [*["five"] * 1000, "endless"]]
    start = time.process_time()
    with pytest.raises(ConfigError, match="has not ended"):
        Template(endless).render_all(conversations, prompt=False, marked=False)
    assert time.process_time() - start < 2


def test_a_thread_that_has_no_time_limit_says_so_once() -> None:
    limits._warn_of_no_limit.cache_clear()
    conversations = [[{"role": "user", "content": "five"}]]

    def render(text: str) -> None:
        Template(text).render_all(conversations, prompt=False, marked=False)

    with ThreadPoolExecutor(1) as other, pytest.warns(UserWarning, match="only the main thread") as told:
        list(other.map(render, ["{{ messages[0].content }}", "{{ messages[0].content }}!"]))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limits._warn_of_no_limit.cache_clear()
        Template("{{ messages[0].content }}").render_all(conversations, prompt=False, marked=False)


def test_what_templates_of_models_do_is_rendered_as_transformers_renders_it() -> None:
    messages = [{"role": "user", "content": " one\n two "}, {"role": "assistant", "content": "six"}]
    text = (
        "{% macro m(x) %}<{{ x | trim }}>{% endmacro %}{% set ns = namespace(n=0, all='') %}{% for x in messages %}"
        "{% set ns.n = ns.n + 2 ** loop.index * 3 %}{% set ns.all = ns.all ~ x.content.replace('o', '0') + '%2d' % 5 %}"
        "{{ m(x.content) }}{{ x | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}"
        "{{ x.content | indent(3, true) }}{{ '{:>5}'.format(x.role) }}{{ 'a' | center(9) }}{% endfor %}"
        "{{ ns.n }}{{ ns.all }}{% block b %}{{ messages | length }}{% endblock %}{{ none }}{{ [1, 'a'] }}"
    )
    assert Template(text).render(messages) == render_jinja_template([messages], chat_template=text)[0][0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_a_template_that_looks_behind_its_values_is_refused(attack: str, write: Write) -> None:
    """B83."""
    rows = [{"messages": [{"role": "user", "content": "five"}, {"role": "assistant", "content": "five"}]}]
    with pytest.raises(DataError, match=r"row 0 .*access to attribute '__class__' .* is unsafe"):
        SFTDataModule(write("a.jsonl", rows), tokenizer=tiny_tokenizer(attack)).setup()
