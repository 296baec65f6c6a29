"""The graphs that a compiler is given."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


class Graphs:
    """A backend of `torch.compile` that counts products of matrices in forward and backward graphs, and runs these."""

    def __init__(self) -> None:
        self.products: list[int] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: Any, _inputs: Any) -> Any:
        names = Counter(str(node.target) for node in graph.graph.nodes)
        self.products.append(names["aten.mm.default"] + names["aten.addmm.default"])
        return make_boxed_func(graph.forward)

    def compile(self, module: Any, whole: bool = True) -> Any:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        return torch.compile(module, fullgraph=whole, backend=self.backend)

    @property
    def num(self) -> int:
        """Graphs that were compiled, a forward and its backward pass counted once."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]
