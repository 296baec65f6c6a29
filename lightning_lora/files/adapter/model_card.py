"""The ``README.md`` of an adapter folder: a model card with measured facts only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from lightning_lora.files.adapter.manifest import Manifest

_CARD = """\
---
library_name: peft
{% if base %}base_model: {{ base }}
{% endif %}tags: [lora, lightning-lora]
---

# LoRA adapter{% if base %} for {{ base }}{% endif %}


| | |
|---|---|
| adapted layers | {{ layers | length }} ({{ roles }}) |
| rank | {{ ranks }} |
| alpha | {{ config.alpha }} ({{ config.scaling }} scaling) |
| targets | {{ config.targets if config.targets is string else config.targets | join(", ") }} |
{% if config.dora %}| method | DoRA: a magnitude for each output feature |
{% endif %}| adapter parameters | {{ "{:,}".format(parameters) }} |
| base fingerprint | `{{ fingerprint }}` |
{% for name, value in summary.items() %}| {{ name }} | {{ value }} |
{% endfor %}

Load it with `lightning_lora.load_adapter(model, folder)`, or with PEFT's
`PeftModel.from_pretrained(model, folder)`. Written by {{ versions }}.
"""


def model_card(peft: Mapping[str, Any], manifest: Manifest) -> str:
    """Markdown for an adapter, from its PEFT config and its manifest."""
    roles = [entry.role for entry in manifest.layers.values()]
    ranks = sorted(set(manifest.ranks.values()))
    template = Environment(autoescape=False, trim_blocks=True).from_string(_CARD)  # Markdown, from our own template
    return template.render(
        base=peft["base_model_name_or_path"],
        layers=manifest.layers,
        roles=", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles)),
        ranks=ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        config=manifest.config,
        parameters=sum(math.prod(shape) for name, shape in manifest.tensors.items() if ".lora_" in name),
        fingerprint=manifest.base_fingerprint,
        summary=manifest.summary,
        versions=", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    )
