"""Attention and torch's transformer layers: adapters take effect in training and in eval alike."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, inject_lora, lora_layers, merge_lora, remove_lora
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.lora.layers.attention import LoRAReader
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.lora.layers.laws import Case, Laws, numbers
from tests.support import toys
from tests.support.tiny_models import portrait, wake

pytestmark = [
    *toys.expected_warnings,
    # Torch says so whenever a nested tensor, or none, is made.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning"),
]


def tokens(seed: int = 5) -> Tensor:
    return numbers(3, 5, 8, seed=seed)


def to_itself() -> tuple[Any, ...]:
    x = tokens()
    return x, x, x


def to_others() -> tuple[Any, ...]:
    return tokens(), numbers(3, 4, 6, seed=1), numbers(3, 4, 7, seed=2)


def case(num_weights: int, settings: dict[str, Any] | None = None, inputs: Any = to_itself, **options: Any) -> Case:
    return Case(lambda: nn.MultiheadAttention(8, 2, **options), inputs, num_weights, settings or {})


class TestAttention(Laws):
    kinds = ("both projections", "output projection", "other widths", "encoder layer")
    cases = {
        "both projections": case(2, batch_first=True),
        "sequence first": case(2),
        "odd heads": Case(lambda: nn.MultiheadAttention(9, 3), lambda: (numbers(3, 5, 9),) * 3, 2),
        "input projection": case(1, {"exclude": ["out_proj"]}, batch_first=True),
        "output projection": case(1, {"targets": ["out_proj"]}, batch_first=True),
        "no bias": case(2, bias=False, batch_first=True),
        "cross attention": case(2, None, lambda: (tokens(), tokens(1), tokens(2)), batch_first=True),
        "other widths": case(4, None, to_others, kdim=6, vdim=7, batch_first=True),
        "one of three": case(1, {"targets": ["k_proj_weight"]}, to_others, kdim=6, vdim=7, batch_first=True),
        "biased keys": case(2, add_bias_kv=True, add_zero_attn=True),
        "ranks": case(2, {"rank_pattern": {"out_proj": 1}}, batch_first=True),
        "alphas": case(2, {"rank_pattern": {"*": 1}}, batch_first=True),
        "decoder layer": Case(lambda: nn.TransformerDecoderLayer(8, 2, 12, 0.0), lambda: (tokens(), tokens(1)), 6),
        "encoder layer": Case(
            lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), lambda: (tokens(),), 4
        ),
        "transformer": Case(
            lambda: nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True), lambda: (tokens(), tokens(1)), 10
        ),
    }


TARGETS: dict[str, Any] = {
    "three": ["linear1", "linear2", "out_proj"],
    "all": "all",
    **{name: [name] for name in ("linear1", "linear2", "self_attn", "out_proj")},
}
# The first of two layers decides how the encoder treats padding.
TARGETS["second layer"] = ["layers.1.*"]
every_target = pytest.mark.parametrize("targets", TARGETS)


def encoder(batch_first: bool = True, norm_first: bool = False, dropout: float = 0.0) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=batch_first, norm_first=norm_first)
    module = nn.TransformerEncoder(layer, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def adapted(module: nn.Module, targets: str = "all", **settings: Any) -> nn.Module:
    inject_lora(module, LoRAConfig.from_dict({"rank": 2, "targets": TARGETS[targets], **settings}))
    wake(module, size=0.1)
    return module


# True where a token is padding.
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


# Every target in one layout, and every layout with all targets.
LAYOUTS = [(True, False, name) for name in TARGETS] + [(False, False, "all"), (True, True, "all"), (False, True, "all")]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("batch_first", "norm_first", "targets"), LAYOUTS)
def test_an_encoder_has_the_same_effect_in_eval_as_in_training(
    batch_first: bool, norm_first: bool, padded: bool, targets: str
) -> None:
    base, module = (encoder(batch_first, norm_first) for _ in range(2))
    adapted(module, targets)
    x = tokens().float() if batch_first else tokens().float().transpose(0, 1).contiguous()
    padding = PADDING if padded else None
    valid = ~PADDING if padded else torch.ones_like(PADDING)
    valid = valid if batch_first else valid.T

    def output(net: nn.Module) -> Tensor:
        return net(x, src_key_padding_mask=padding)[valid]

    with torch.no_grad():
        in_training = output(module) - output(base)
        in_eval = output(module.eval()) - output(base.eval())
        # Without a norm at the end outputs are larger than 1, and so is one step of float32.
        tolerance = 1e-6 * max(1.0, float(output(base).abs().max()))
    assert in_training.abs().max() > 1e-2
    torch.testing.assert_close(in_eval, in_training, rtol=0, atol=tolerance)
    # With gradients in eval, too, though torch then sees frozen weights only.
    found = output(module)
    torch.testing.assert_close(found - output(base), in_eval, rtol=0, atol=tolerance)
    found.square().sum().backward()
    for layer in lora_layers(module).values():
        for factor in layer.lora_factors().values():
            assert factor.grad is not None
            assert factor.grad.any()


def test_peft_has_no_effect_in_eval_there() -> None:
    base, x = encoder().eval(), tokens().float()
    config = peft.LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert (theirs.train()(x) - base.train()(x)).abs().max() > 1e-2
        assert torch.equal(theirs.eval()(x), base.eval()(x))


def test_padding_stays_zero_in_eval_as_in_the_base() -> None:
    module, x = adapted(encoder().eval()), tokens().float()
    with torch.no_grad():
        assert not module(x, src_key_padding_mask=PADDING)[PADDING].any()


def test_gradients_in_eval_are_those_of_training() -> None:
    found = []
    for mode in (True, False):
        module = adapted(encoder()).train(mode)
        module(tokens().float(), src_key_padding_mask=PADDING)[~PADDING].square().sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


@every_target
def test_removing_from_an_encoder_leaves_no_trace(targets: str) -> None:
    module, x = encoder().eval(), tokens().float()
    before = portrait(module) | {"trains": None}
    with torch.no_grad():
        expected = module(x, src_key_padding_mask=PADDING)
        adapted(module, targets)(x, src_key_padding_mask=PADDING)
    readers = [name for name, child in module.named_modules() if isinstance(child, LoRAReader)]
    assert {"", "layers.1"} <= set(readers)
    remove_lora(module)
    assert portrait(module) | {"trains": None} == before
    with torch.no_grad():
        assert torch.equal(module(x, src_key_padding_mask=PADDING), expected)


@every_target
def test_copies_and_pickles_of_an_encoder_take_effect_in_eval(targets: str) -> None:
    module, x = adapted(encoder().eval(), targets), tokens().float()
    with torch.no_grad():
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module)
            assert torch.equal(twin(x), expected)


@every_target
def test_a_merged_encoder_equals_the_adapted_one(targets: str) -> None:
    module, x = adapted(encoder().eval(), targets), tokens().float()
    with torch.no_grad():
        expected = module(x, src_key_padding_mask=PADDING)
        merge_lora(module)
        torch.testing.assert_close(module(x, src_key_padding_mask=PADDING), expected, rtol=0, atol=1e-5)


def test_an_error_in_forward_leaves_the_weights_in_place() -> None:
    module = adapted(encoder().eval())
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    with torch.no_grad(), pytest.raises(RuntimeError, match="embed_dim 8 didn't match last dim of query 7"):
        module(torch.zeros(3, 5, 7))
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    assert all(layer.lora_active for layer in lora_layers(module).values())


class Wide(nn.TransformerEncoderLayer):
    """A user's encoder layer."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(src, *args, **kwargs)


def test_a_subclass_of_an_encoder_layer_stays_what_it_is() -> None:
    module = nn.TransformerEncoder(Wide(8, 2, 12, 0.0, batch_first=True), 1).eval()
    x = tokens().float()
    with torch.no_grad():
        base = module(x)
        adapted(module)
        assert isinstance(module.layers[0], Wide)
        found = pickle.loads(pickle.dumps(module))(x)
        assert torch.equal(found, module(x))
        assert not torch.equal(found, base)


@pytest.mark.parametrize("targets", ["self_attn", "out_proj"])
def test_dropout_on_the_update_is_refused(targets: str) -> None:
    module = encoder()
    with pytest.raises(ConfigError, match=r"dropout=0.1 cannot act on 2 of the targeted layers \(layers.0.self_attn"):
        inject_lora(module, LoRAConfig(rank=2, targets=[targets], dropout=0.1))
    assert not lora_layers(module)
    inject_lora(module, LoRAConfig(rank=2, targets=["linear1", "linear2"], dropout=0.1))


@pytest.mark.parametrize("targets", ["all", "out_proj"])
def test_attention_computes_under_autocast(targets: str) -> None:
    module, x = adapted(encoder(), targets), tokens().float()
    expected = module(x)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = module.train(mode)(x)
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


class Encoder(LoRAMixin, toys.Plain):
    """An encoder in a LightningModule."""

    lora = LoRAConfig(rank=2)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (1, 8)), encoder(), nn.Flatten(), nn.Linear(8, 2))  # pyright: ignore


def test_the_guard_sees_adapters_that_others_compute_with(tmp_path: Path) -> None:
    module = Encoder()
    trainer = toys.trainer(tmp_path, callbacks=[LoRAGuard(patience=1)], max_epochs=2)
    trainer.fit(module, toys.loader(), toys.loader())
    assert all(toys.moved(module))
    assert len(toys.moved(module)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_a_compiled_encoder_computes_the_same(mode: bool) -> None:
    module, x = adapted(encoder()).train(mode), tokens().float()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
    compiled(x).sum().backward()
    assert all(
        factor.grad is not None for layer in lora_layers(module).values() for factor in layer.lora_factors().values()
    )
