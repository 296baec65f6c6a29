"""The picture of a deep model stays readable, and says what a cell without a number means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_lora.capacity.heat_map import draw_capacity
from lightning_lora.capacity.reading import CapacityReading, GroupReading


def test_thirty_layers_have_six_lines_for_each_role_and_a_word_in_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    full = GroupReading(4, 2, 3, share=0.1, truncation=0.3, capture=0.2, spectrum=(2.0, 1.0, 0.5, 0.0))
    idle = GroupReading(4, 2, 3, share=0.001, spectrum=(0.1, 0.1, 0.0, 0.0))
    groups = {f"layer {n} {role}": full for n in range(30) for role in ("attention", "mlp")}
    draw_capacity(CapacityReading(groups=groups | {"layer 7 mlp": idle}), tmp_path / "picture.png")
    truncation, capture, _, spectra = figures[0].axes
    words = [text.get_text() for text in truncation.texts]
    assert len(words) == 60
    assert (words.count("30%"), words.count("idle")) == (59, 1)
    assert sum(text.get_text() == "idle" for text in capture.texts) == 1
    assert len(spectra.lines) == 12
    named = [text.get_text() for text in spectra.get_legend().get_texts()]
    assert named[:3] == ["attention", "mlp", "layer 0 to layer 4"]
    assert named[-1] == "layer 25 to layer 29"
    # The mean of five layers of which one is nearly idle.
    assert list(spectra.lines[3].get_ydata()[:2]) == pytest.approx([(4 * 2.0 + 0.1) / 5, (4 * 1.0 + 0.1) / 5])
