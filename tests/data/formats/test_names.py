"""A user's own names for columns and keys, and what is said of names that are unknown."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.data import SFTDataModule
from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.suggest import suggest_names
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.data.formats.reading import chat, conversation, read
from tests.support.tiny_tokenizer import tiny_tokenizer

GERMAN = {"frage": "question", "antwort": "answer"}


def test_columns_of_any_name_can_be_mapped() -> None:
    columns = {**GERMAN, "rolle": "system", "kontext": "context", "gewicht": "weight", "text": "options"}
    row = {"frage": "Hi", "antwort": "Yes", "rolle": "s", "kontext": "c", "gewicht": "3", "text": ["o"], "id": 1}
    record = conversation(row, columns=columns)
    assert record.messages == chat(("system", "s"), ("user", "Hi\no\n\nc"), ("assistant", "Yes"))
    assert record.weight == 3
    assert record.unused == {"id"}
    assert record.renamed == columns.keys()


def test_keys_of_messages_can_be_mapped() -> None:
    columns = {
        "verlauf": "messages",
        "wer": "from",
        "was": "content",
        "gedanke": "reasoning_content",
        "lernen": "train",
    }
    turns = [{"wer": "user", "was": "Hi"}, {"wer": "assistant", "was": "Yes", "gedanke": "hm", "lernen": False}]
    record = conversation({"verlauf": turns}, columns=columns)
    assert record.messages == [*chat(("user", "Hi")), {**chat(("assistant", "Yes"))[0], "reasoning_content": "hm"}]
    assert record.untrained == {1}
    assert record.renamed == columns.keys()


def test_names_can_change_places() -> None:
    swapped = {"question": "answer", "answer": "question"}
    assert conversation({"question": "Yes", "answer": "Hi"}, columns=swapped).messages[0]["content"] == "Hi"


def test_a_mapped_column_comes_before_one_of_that_name_which_is_then_unused() -> None:
    record = conversation({"long": "Hi", "question": "H", "answer": "Yes"}, columns={"long": "question"})
    assert record.messages == chat(("user", "Hi"), ("assistant", "Yes"))
    assert record.unused == {"question"}


def test_two_columns_of_one_name_are_refused_only_where_both_are_filled() -> None:
    columns = {"q": "question", "frage": "question"}
    gap = {"q": None, "frage": None, "answer": "Yes"}
    for row in ({"q": "Hi", "answer": "Yes"}, {**gap, "frage": "Hi"}, {**gap, "q": "Hi"}):
        assert conversation(row, columns=columns).messages[0]["content"] == "Hi"
    with pytest.raises(RowError, match="row 0: columns maps both 'q' and 'frage' to 'question', and the row has both"):
        conversation({"q": "Hi", "frage": "Ho", "answer": "Yes"}, columns=columns)


def test_names_of_a_user_are_told_as_the_user_wrote_them() -> None:
    assert read({"text": "t", "kontext": "c"}, columns={"kontext": "context"}).unused == {"kontext"}


@pytest.mark.parametrize(
    ("known", "hint"),
    [
        ("questoin", "did you mean 'question'"),
        ("resoning", "did you mean 'reasoning'"),
        ("zzz", "or key. Columns: ans"),
    ],
)
def test_an_unknown_target_is_refused_at_once(known: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"columns maps 'frage' to '{known}', which is no known column.*{hint}"):
        SFTDataModule("a.jsonl", columns={"frage": known})


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["frage", "antwort"], {"frage": "question", "antwort": "answer"}),
        (["id", "query", "response"], {"query": "question", "response": "answer"}),
        (["Question", "Answer"], {"Question": "question", "Answer": "answer"}),
        (["promt", "completion"], {"promt": "prompt"}),
        (["instruction", "input", "outptu"], {"outptu": "output"}),
        (["dialogue", "id"], {"dialogue": "messages"}),
        (["mesages", "tools"], {"mesages": "messages"}),
        (["content"], {"content": "text"}),
        ([], {}),
    ],
)
def test_unknown_columns_suggest_the_mapping_to_write(columns: list[str], mapping: dict[str, str]) -> None:
    assert suggest_names(columns) == mapping
    row = dict.fromkeys(columns, "x")
    with pytest.raises(DataError, match="fit no known format") as caught:
        read(row)
    advice = ", ".join(f"{own}: {known}" for own, known in mapping.items())
    assert f"columns: {{{advice}}}." in str(caught.value) or not columns
    if mapping and columns[0] not in ("dialogue", "mesages"):
        read(row, columns=mapping)  # the advice works


def test_a_misspelt_source_is_named_with_the_column_it_resembles() -> None:
    with pytest.raises(DataError) as caught:
        read({"frage": "Hi", "antwort": "Yes"}, columns={"fraage": "question", "antwort": "answer"})
    assert "columns maps 'fraage', which the row does not have; did you mean 'frage'?" in str(caught.value)
    assert "columns: {antwort: answer, frage: question}." in str(caught.value)


ROWS = [{"question": "Hello", "answer": "five", "kontext": "there"}, {"question": "Hello", "answer": "five", "id": 1}]


def module(path: str | list[str], columns: dict[str, str], **options: Any) -> SFTDataModule:
    data = SFTDataModule(path, tokenizer=tiny_tokenizer(), columns=columns, **options)
    data.setup()
    return data


def test_a_mapping_that_no_row_needs_is_refused(write: Write) -> None:
    path = write("a.jsonl", ROWS)
    for _ in ("fresh", "from the cache"):
        with pytest.raises(DataError) as caught:
            module(path, {"contxt": "context"})
        assert "columns maps 'contxt' to 'context', but no row of train has 'contxt'; did you mean 'kontext'?" in str(
            caught.value
        )
        assert "Names that nothing reads: id, kontext." in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*nothing reads 'id'")
def test_a_mapping_may_belong_to_some_rows_or_files_only(write: Write) -> None:
    files = [write("a.jsonl", ROWS), write("b.jsonl", [{"frage": "Hello", "antwort": "five"}])]
    data = module(files, {**GERMAN, "kontext": "context"})
    assert len(data.rows["train"]) == 3
    data = module(files[0], {**GERMAN, "kontext": "context"}, validation=files[1])
    assert len(data.rows["train"]) == 2
    text = data._find_tokenizer().decode(data.rows["train"][0]["input_ids"])
    assert "Hello\n\nthere" in text


def test_settings_keep_their_identity() -> None:
    assert RowSettings(8, {"a": "question"}).identity() != RowSettings(8, {"b": "question"}).identity()
