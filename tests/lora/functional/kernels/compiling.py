"""Compiles every kernel for GPUs that need not be there; a script, since Triton must not interpret in its process."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lora.lora.functional.kernels import cross_entropy, gate, narrow

SHARED = {86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability: consumer cards, H100."""


def compile_for(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """To machine code for a GPU; what it needs must be there."""
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED[capability], f"{constants}: {made.metadata.shared} bytes"


def main() -> None:
    """Every kernel, on small cards with what needs most memory."""
    for activation in ("silu", "none", "tanh"):
        pointers = {name: "*bf16" for name in ("gate", "up", "x", "d_x", "d_gate", "d_up")}
        constants = {"ACTIVATION": activation, "BLOCK": gate.BLOCK}
        compile_for(90, gate._product, pointers, constants, gate.OPTIONS)
        compile_for(90, gate._gradients, pointers, constants | {"PRODUCT": True}, gate.OPTIONS)
    for capability, kind, size, width in ((90, "bf16", 2, 16), (90, "fp32", 4, 64), (86, "fp32", 4, 64)):
        pointers = {**dict.fromkeys("yBS", f"*{kind}"), "by_rows": "*fp32", "by_columns": "*fp32", "scale": "fp32"}
        constants = {"ROWS": narrow.block_rows(width, size), "COLUMNS": narrow.COLUMNS, "WIDTH": width}
        compile_for(capability, narrow._both, pointers, constants, narrow.OPTIONS)
    pointers = {"scores": "*bf16", "labels": "*i64", "factors": "*fp32", "losses": "*fp32"}
    constants = {"WEIGHTED": True, "GRADIENT": True, "BLOCK": cross_entropy.MAX_BLOCK}
    compile_for(90, cross_entropy._cross_entropy, pointers, constants, cross_entropy.OPTIONS)


if __name__ == "__main__":
    main()
