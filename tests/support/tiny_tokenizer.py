"""A real byte-level BPE tokenizer, trained in-process, and chat templates for it."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEXTS = [
    "what is the sum of two and three? the answer is five.",
    "Hello there, how are you? I am well.\n\nGood.",
    "0123456789",
]

MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% endif %}"
).replace("|>\n", "|>{{ '\n' }}")
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
OPEN = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
"""Leaves the end token out of the marks."""
SPOKEN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Ends turns with line breaks instead of a special token."""
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + UNMARKED


def tiny_tokenizer(template: str | None = MARKED, starts: bool = False, trims: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of about 400 tokens; ``starts`` adds a begin token, ``trims`` trims offsets as GPT-2 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    if starts:
        backend.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", SPECIALS.index("<|start|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=template,
    )
