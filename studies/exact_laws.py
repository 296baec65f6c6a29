"""Exact laws of the parametrisation (T0), as numbers; docs/findings/exact_laws.md names the tests that hold them.

    PYTHONPATH=. python studies/exact_laws.py

It takes seconds, and a larger model shows nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, count_parameters, inject_lora, lora_layers, merge_lora, unmerge_lora
from studies.modules.pages import run_laws
from studies.modules.rows import VOCAB, rows_of
from studies.modules.tiny_gpt import TinyGPT

Line = dict[str, object]


def exchange(p: float, q: float, scaled_eps: bool) -> float:
    """Largest difference of a loss in 20 steps after alpha/(p q), p A, p LR_A, q LR_B; eps/p and eps/q if scaled."""
    return float((_losses(p, q, scaled_eps) - _losses(1, 1, True)).abs().max())


def _losses(p: float, q: float, scaled_eps: bool) -> Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    inject_lora(net, LoRAConfig(rank=4, alpha=32 / (p * q)))
    layers = list(lora_layers(net).values())
    for layer in layers:
        layer.lora_A.data *= p
    groups = [
        {
            "params": [getattr(layer, name) for layer in layers],
            "lr": 3e-3 * size,
            "eps": 1e-3 / (size if scaled_eps else 1),
        }
        for name, size in (("lora_A", p), ("lora_B", q))
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    x, y = torch.randn(64, 16).double(), torch.randn(64, 8).double()
    losses = []
    for _ in range(20):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def merging() -> tuple[float, float, bool]:
    """Largest change of a logit by fresh adapters, by merging (relative), and whether all bits are restored."""
    torch.manual_seed(0)
    net = TinyGPT(VOCAB, 128, 2, 4).requires_grad_(False)
    ids = rows_of("text", "new", 8)["input_ids"]
    base, before = net(ids), {name: weight.clone() for name, weight in net.state_dict().items()}
    inject_lora(net, LoRAConfig(rank=8))
    fresh = float((net(ids) - base).abs().max().detach())
    for layer in lora_layers(net).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    trained = net(ids)
    merge_lora(net)
    merged = float(((net(ids) - trained).abs().max() / trained.abs().max()).detach())
    unmerge_lora(net)
    after = net.state_dict()
    return fresh, merged, all(torch.equal(after[name], weight) for name, weight in before.items())


def first_update(rank: int, scaling: str, seed: int, num_inits: int = 200) -> Tensor:
    """The mean update of a weight after one Adam step, over initialisations of A."""
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(16, 64, generator=generator).double() for _ in range(2))
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(num_inits)).double()
    for weight in layers.parameters():
        nn.init.zeros_(weight)
    inject_lora(layers, LoRAConfig(rank=rank, scaling=scaling))  # pyright: ignore[reportArgumentType]
    adapted = lora_layers(layers).values()
    optimizer = torch.optim.Adam([layer.lora_B for layer in adapted], lr=1e-3, eps=0)
    torch.stack([(layer(x) - target).square().mean() for layer in layers]).sum().backward()
    optimizer.step()
    return torch.stack([layer.weight_delta() for layer in adapted]).mean(0).detach()


def parameters_of_8b(targets: str, head: bool) -> int:
    """Adapter parameters of each unit of rank in Llama-3.1-8B, from its shapes."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inject_lora(model, LoRAConfig(rank=8, targets=targets, adapt_head=head))
    return count_parameters(model).adapter // 8


def operations(rank: int, width: int = 128) -> tuple[int, int]:
    """Operations of a step of a square layer with adapters: counted, and by the formula."""
    layer, rows = nn.Linear(width, width), 16
    inject_lora(layer, LoRAConfig(rank=rank))
    # torch counts products that are added to another tensor, but not those that are added in place.
    in_place = {torch.ops.aten.addmm_: lambda added, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        layer(torch.randn(rows, width, requires_grad=True)).sum().backward()
    return counter.get_total_flops(), 2 * rows * (2 * width**2 + 6 * rank * width)


def laws() -> Iterator[Line]:
    """A line for each number: the law, the case, what was found, and what the law says."""
    for p, q in ((4.0, 0.5), (3.0, 7.0)):
        for scaled in (True, False):
            case = f"p {p:g}, q {q:g}, eps {'scaled' if scaled else 'as it was'}"
            expected = "0 within 1e-10" if scaled else "not 0"
            yield {
                "law": "two hyperparameters are redundant",
                "case": case,
                "found": exchange(p, q, scaled),
                "says": expected,
            }
    fresh, merged, restored = merging()
    yield {"law": "a fresh adapter changes nothing", "case": "largest logit difference", "found": fresh, "says": "0"}
    yield {
        "law": "merging changes nothing",
        "case": "largest relative difference",
        "found": merged,
        "says": "below 1e-5",
    }
    yield {"law": "unmerging restores every bit", "case": "all weights", "found": restored, "says": "True"}
    reference = first_update(64, "standard", seed=0)
    for scaling in ("standard", "rslora"):
        for rank in (1, 4, 16, 64):
            size = float((first_update(rank, scaling, seed=rank) * reference).sum() / reference.square().sum())
            says = "1" if scaling == "standard" else f"{math.sqrt(rank):g} (its root of the rank)"
            yield {"law": "size of the first update", "case": f"{scaling}, rank {rank}", "found": size, "says": says}
    counts = (("mlp", False, 1_769_472), ("attention", False, 851_968), ("all", True, 2_753_792))
    for targets, head, expected in counts:
        case = f"{targets}{' and output layer' if head else ''}"
        found = parameters_of_8b(targets, head)
        yield {"law": "Llama-3.1-8B: parameters of each rank", "case": case, "found": found, "says": str(expected)}
    for rank in (1, 8, 64):
        found, expected = operations(rank)
        yield {"law": "operations of a step", "case": f"128 x 128; rank {rank}", "found": found, "says": str(expected)}


def main() -> None:
    """Measure, print the table and write the CSV."""
    run_laws(__doc__, "exact_laws", laws, digits=3)


if __name__ == "__main__":
    main()
