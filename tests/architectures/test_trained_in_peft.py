"""What was trained in full beside the adapters loads in PEFT with equal outputs, in every class of model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora import LoRAConfig, LoRAMixin, inject_lora, load_adapter, remove_lora, save_adapter
from lightning_lora.tasks import SequenceClassifier
from tests.architectures import ARCHITECTURES
from tests.architectures.adapted_model import difference
from tests.architectures.decoders import GROUPED, SHAPE
from tests.architectures.encoders import CLASSES
from tests.architectures.entry import HEAD, PEFT_LOADS, Outputs, hugging_face, logits, tokens
from tests.architectures.test_architectures import pytestmark as architecture_marks
from tests.support.tiny_models import wake

pytestmark = [
    pytest.mark.slow,
    *architecture_marks,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

ENTRIES = {entry.name: entry for entry in ARCHITECTURES}
ROBERTA: dict[str, Any] = CLASSES | {"max_position_embeddings": 40}
BART: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_labels": 3},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
DISTILBERT: dict[str, Any] = {
    **{"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
    **{"num_labels": 3, "pad_token_id": 0},
}


def spans(model: Any, **inputs: Tensor) -> Tensor:
    output = model(**inputs)
    return torch.cat([output.start_logits, output.end_logits])


def ended() -> dict[str, Tensor]:
    """Rows that end, as models of encoder and decoder want them for classification."""
    ids = tokens()()["input_ids"]
    return {"input_ids": torch.cat([ids, torch.full((len(ids), 1), 2)], 1)}


def case(
    kind: str, config: str, trainable: list[str], output: Any = logits, inputs: Any = None, **settings: Any
) -> Any:
    """A model class with modules to train in full."""
    return pytest.param(
        hugging_face(kind, config, **settings), inputs or tokens(), output, trainable, id=f"{kind} {trainable}"
    )


CLASSIFIERS = {
    "RobertaForSequenceClassification": ("RobertaConfig", ROBERTA),
    "XLMRobertaForSequenceClassification": ("XLMRobertaConfig", ROBERTA),
    "ElectraForSequenceClassification": ("ElectraConfig", CLASSES | {"embedding_size": 16}),
    "CamembertForSequenceClassification": ("CamembertConfig", ROBERTA),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT),
    "GPT2ForSequenceClassification": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                      "n_positions": 32, "pad_token_id": 0, "num_labels": 3}),
    "Qwen3ForSequenceClassification": ("Qwen3Config", GROUPED | {"head_dim": 8, "num_labels": 3}),
}  # fmt: skip


def cases() -> list[Any]:
    made = []
    for kind, (config, settings) in CLASSIFIERS.items():
        head = "score" if config in ("GPT2Config", "Qwen3Config") else "classifier"
        made += [case(kind, config, [head], **settings)]
    roberta = ("RobertaForSequenceClassification", "RobertaConfig")
    # Children alone, a child beside its parent, a glob, and half of a head.
    for trainable in (
        ["classifier.dense", "classifier.out_proj"], ["classifier", "classifier.dense"], ["out_proj", "classifier*"],
        ["classifier.out_proj"], ["roberta.embeddings", "classifier"], ["LayerNorm"],
        ["roberta.encoder.layer.1.output", "classifier"],
    ):  # fmt: skip
        made.append(case(*roberta, trainable, **ROBERTA))
    made += [
        case("DistilBertForSequenceClassification", "DistilBertConfig", ["pre_classifier", "classifier"],
             **DISTILBERT),
        case("BertForTokenClassification", "BertConfig", ["classifier"], **CLASSES),
        case("BertForMultipleChoice", "BertConfig", ["classifier", "pooler"],
             inputs=lambda: {"input_ids": tokens()()["input_ids"][None]}, **SHAPE),
        case("RobertaForQuestionAnswering", "RobertaConfig", ["qa_outputs"], spans,
             **SHAPE | {"max_position_embeddings": 40}),
        case("RobertaForMaskedLM", "RobertaConfig", ["lm_head"],
             **SHAPE | {"max_position_embeddings": 40, "tie_word_embeddings": False}),
        case("ModernBertForMaskedLM", "ModernBertConfig", ["head", "decoder"],
             **SHAPE | {"cls_token_id": 1, "sep_token_id": 2, "tie_word_embeddings": False}),
        case("BartForSequenceClassification", "BartConfig", ["classification_head"], inputs=ended, **BART),
        case("T5ForSequenceClassification", "T5Config", ["classification_head"], inputs=ended, vocab_size=64,
             d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2, num_labels=3,
             decoder_start_token_id=0),
        case("LlamaForCausalLM", "LlamaConfig", ["embed_tokens", "lm_head", "norm"], **GROUPED),
        case("LlamaForTokenClassification", "LlamaConfig", ["score"], **GROUPED, num_labels=3),
    ]  # fmt: skip
    for entry in ARCHITECTURES:
        heads = [pattern.removesuffix(".*") for pattern, reason in entry.left_out.items() if reason == HEAD]
        if heads and entry.peft == PEFT_LOADS:
            made.append(pytest.param(entry.build, entry.inputs, entry.output, heads, id=f"{entry.name} {heads}"))
    llava, vit, clip = ENTRIES["LLaVA"], ENTRIES["ViT"], ENTRIES["CLIP"]
    for entry, trainable in (
        (ENTRIES["Qwen3-MoE"], ["experts"]), (ENTRIES["Mixtral"], ["*.gate", "lm_head"]),
        (llava, ["vision_tower.embeddings"]), (llava, ["multi_modal_projector", "vision_tower", "lm_head"]),
        (llava, ["*.vision_tower.*", "lm_head"]), (vit, ["vit.embeddings", "classifier"]),
        (clip, ["embeddings", "text_projection"]),
    ):  # fmt: skip
        made.append(pytest.param(entry.build, entry.inputs, entry.output, trainable, id=f"{entry.name} {trainable}"))
    return made


def shaken(module: nn.Module) -> nn.Module:
    """``module`` with other values in everything that trains, as after training."""
    wake(module)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def answers(model: nn.Module, inputs: Callable[[], dict[str, Tensor]], output: Outputs) -> Tensor:
    with torch.no_grad():
        return output(model, **inputs())


def no_entry_is_inside_another(folder: Path) -> bool:
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    return bool(saved) and not any(one != other and one.startswith(f"{other}.") for one in saved for other in saved)


@pytest.mark.parametrize(("build", "inputs", "output", "trainable"), cases())
def test_what_was_trained_in_full_loads_in_peft(
    build: Callable[[], nn.Module], inputs: Any, output: Outputs, trainable: list[str], tmp_path: Path
) -> None:
    ours, base = build(), answers(build(), inputs, output)
    inject_lora(ours, LoRAConfig(rank=2, trainable=trainable, exclude=_uncallable(ours)))
    save_adapter(shaken(ours), tmp_path / "adapter")
    expected = answers(ours, inputs, output)
    assert difference(base, expected) > 1e-3
    assert no_entry_is_inside_another(tmp_path / "adapter")
    theirs: Any = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")  # pyright: ignore[reportArgumentType]
    assert difference(expected, answers(theirs.eval().base_model.model, inputs, output)) <= 1e-5
    again = build()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answers(again, inputs, output), expected)


def test_what_trains_outside_the_root_of_the_adapters_loads_in_peft(tmp_path: Path) -> None:
    """The language model of a vision-language model is adapted, and all around it trains in full."""

    class Task(LoRAMixin, LightningModule):
        def __init__(self) -> None:
            around = ["net.model.vision_tower", "net.model.multi_modal_projector", "net.lm_head"]
            super().__init__(lora=LoRAConfig(rank=2, trainable=around), lora_root="net.model.language_model")
            self.net = ENTRIES["LLaVA"].build()

    task, entry = Task().eval(), ENTRIES["LLaVA"]
    task.apply_lora()
    shaken(task)
    task.save_adapter(tmp_path / "adapter")
    expected = answers(task.net, entry.inputs, entry.output)
    theirs: Any = peft.PeftModel.from_pretrained(entry.build(), tmp_path / "adapter")  # pyright: ignore
    assert no_entry_is_inside_another(tmp_path / "adapter")
    assert difference(expected, answers(theirs.eval().base_model.model, entry.inputs, entry.output)) <= 1e-5


def test_the_classifier_task_writes_a_nested_head_that_peft_loads(tmp_path: Path) -> None:
    build = hugging_face("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA)
    build().save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    task = SequenceClassifier(str(tmp_path / "base"), num_labels=3, lora=LoRAConfig(rank=2))
    task.configure_model()
    shaken(task.eval())
    task.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    theirs: Any = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")  # pyright: ignore
    inputs = tokens()()
    with torch.no_grad():
        expected = task(inputs["input_ids"], torch.ones_like(inputs["input_ids"]))
        found = theirs.eval()(inputs["input_ids"], torch.ones_like(inputs["input_ids"])).logits
    assert difference(expected, found) <= 1e-5


def test_what_only_completes_a_module_for_peft_stays_frozen_when_loaded(tmp_path: Path) -> None:
    build = hugging_face("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT)
    ours: Any = build()
    inject_lora(ours, LoRAConfig(rank=2, trainable=["classifier"], exclude=["pre_classifier"]))
    ours.distilbert.embeddings.LayerNorm.bias.requires_grad_(True)
    save_adapter(shaken(ours), tmp_path / "adapter")
    again: Any = build()
    load_adapter(again, tmp_path / "adapter")
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {"classifier.weight", "classifier.bias", "distilbert.embeddings.LayerNorm.bias"}


@pytest.mark.parametrize("name", ["bias of an adapted layer", "module that another name ends with"])
def test_what_peft_cannot_be_told_is_said(name: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4)), "up": nn.Linear(4, 4)})
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net["head"](self.net["up"](x)))

    ours, again = Net(), Net()
    again.load_state_dict(ours.state_dict())
    inject_lora(ours, LoRAConfig(rank=1, trainable=["head"], exclude=["net.head.*"]))
    if name.startswith("bias"):
        ours.net["up"].bias.requires_grad_(True)
    else:
        remove_lora(ours)
        inject_lora(ours, LoRAConfig(rank=1, targets=["net.head.*"]))
        ours.head.requires_grad_(True)
    said = "net.up.bias, trained beside" if name.startswith("bias") else "net.head, which it takes for head"
    with pytest.warns(UserWarning, match=said):
        save_adapter(shaken(ours), tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(3, 4)
    assert torch.equal(again(x), ours(x))


def _uncallable(model: nn.Module) -> list[str]:
    wavlm = type(model).__name__.startswith("WavLM")
    return ["*.attention.*_proj"] if wavlm else []
