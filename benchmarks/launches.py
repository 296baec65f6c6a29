"""How many operators a training step asks a device for, above what the frozen model takes: exact on any machine.

    python -m benchmarks.launches

Where a model is small or its batch is, a GPU waits for the host, and the host's time is the number of operators. They
are counted here as PyTorch dispatches them, forward and backward: views and memory alone launch nothing and are left
out. A Llama of eight layers with seven linear layers each, of a toy's dimensions, all adapted at rank 16. ``floor`` is
the frozen model with the gradient that reaches its embeddings. The third pass is counted: groups of siblings are known
then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import Trainee
from benchmarks.gpu.contenders import floor, full, ours, with_peft
from benchmarks.workloads import Batch, Loss, next_token_loss

LAYERS = 8
LINEARS = 7 * LAYERS

_NO_LAUNCH = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_",
}  # fmt: skip


def _launches(operator: torch._ops.OpOverload) -> bool:
    return not operator.is_view and operator.overloadpacket.__name__ not in _NO_LAUNCH


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that compute something while it is entered.

    Attributes:
        counts: Name of each operator to how often it was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _launches(func):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step_launches(trainee: Trainee, batch: Batch, autocast: torch.dtype | None = None) -> Counter[str]:
    """Operators of forward and backward in a step that is not the first, with what the optimizer's step makes anew."""

    def step() -> None:
        with nullcontext() if autocast is None else torch.autocast(batch.input_ids.device.type, autocast):
            loss = trainee.loss(trainee.model, batch)
        loss.backward()

    for _ in range(2):
        step()
        if trainee.optimizer is not None:
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
    with LaunchCounter() as counter:
        step()
    return counter.counts


def compiled_launches(name: str, precision: str) -> Counter[str]:
    """Operators of the graphs that `torch.compile` makes of a contender's step: what a compiler has yet to fuse."""
    dtype, autocast = PRECISIONS[precision]
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    trainee, counts = CONTENDERS[name](toy_llama(dtype), next_token_loss), Counter[str]()

    def keep(graph: Any, _inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and _launches(node.target):
                counts[node.target.overloadpacket.__name__] += 1
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    trainee.model.compile(fullgraph=True, backend=backend)
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        loss = trainee.loss(trainee.model, Batch(ids, ids))
    loss.backward()
    return counts


def toy_llama(dtype: torch.dtype) -> nn.Module:
    """Eight layers with random frozen weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).train()


CONTENDERS: Mapping[str, Callable[[nn.Module, Loss], Trainee]] = {
    "floor": floor,
    "full fine-tuning": full,
    "ours": ours,
    "ours, dropout 0.1": partial(ours, dropout=0.1),
    "PEFT": with_peft,
    "PEFT, `autocast_adapter_dtype=False`": partial(with_peft, autocast=False),
}

PRECISIONS = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-mixed, base in bfloat16": (torch.bfloat16, torch.bfloat16),
}
"""Type of the base weights, and that of autocast."""


def launches(name: str, precision: str) -> Counter[str]:
    """Operators of a contender's step in a precision."""
    dtype, autocast = PRECISIONS[precision]
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    return step_launches(CONTENDERS[name](toy_llama(dtype), next_token_loss), Batch(ids, ids), autocast)


def main() -> None:
    """Print a Markdown table: all operators of the floor, then what others take above it for each adapted layer."""
    print("| operators | " + " | ".join(PRECISIONS) + " |\n|---|" + "---|" * len(PRECISIONS))
    floors = {precision: launches("floor", precision).total() for precision in PRECISIONS}
    print("| floor, all | " + " | ".join(map(str, floors.values())) + " |")
    for name in list(CONTENDERS)[1:]:
        above = [(launches(name, precision).total() - floors[precision]) / LINEARS for precision in PRECISIONS]
        print(f"| {name}, above the floor for each of {LINEARS} | " + " | ".join(f"{n:+.1f}" for n in above) + " |")


if __name__ == "__main__":
    main()
