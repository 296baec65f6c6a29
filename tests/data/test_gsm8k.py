from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_lora.data import SFTDataModule

SHARED = Path(__file__).parents[3] / "shared"
TRAIN = SHARED / "data" / "gsm8k" / "train.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not TRAIN.exists(), reason=f"needs the real data in {SHARED}"),
]


@pytest.mark.filterwarnings("ignore:train. 26 of 7473 rows longer than max_length=600")
def test_all_of_gsm8k(tmp_path: Path) -> None:
    data = SFTDataModule(str(TRAIN), batch_size=64, max_length=600, tokenizer=str(SHARED / "models" / "tiny-base"))
    data.setup("fit")
    statistics = data.statistics["train"]
    assert (statistics.rows, statistics.dropped_rows, statistics.longest) == (7473, 0, 728)
    tokenizer = data.tokenizer
    assert tokenizer is not None
    lines = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    for index in range(0, 7473, 500):
        row = data.rows["train"][index]
        trained = [i for i, used in zip(row["input_ids"], row["supervised"], strict=True) if used]
        assert tokenizer.decode(trained) == lines[index]["answer"] + "<|end|>"  # type: ignore[union-attr]
        assert lines[index]["question"] in tokenizer.decode(row["input_ids"])  # type: ignore[union-attr]
    batches = list(data.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == 7473
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == statistics.tokens
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == statistics.supervised_tokens


def test_instructions_of_gpteacher() -> None:
    path = str(SHARED / "data" / "codegen_instruct" / "codegen-instruct.json")
    data = SFTDataModule(path, tokenizer=str(SHARED / "models" / "tiny-base"), max_rows=300)
    data.setup("fit")
    assert data.statistics["train"].rows == 300
