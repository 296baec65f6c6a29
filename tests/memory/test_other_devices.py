"""A batch on a GPU is traced as one on a CPU, and attention counts the same in every torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from lightning_lora.memory.counted import attention_backward_flops, attention_flops
from lightning_lora.memory.process_peak import restart_peak
from lightning_lora.memory.step_mode import known_batch


def test_operations_of_attention_are_those_of_torch() -> None:
    q, k, v = (torch.empty(2, 8, tokens, width) for tokens, width in ((10, 16), (12, 16), (12, 24)))
    d_out = torch.empty(2, 8, 10, 24)
    assert attention_flops(q, k, v) == sdpa_flop_count(q.shape, k.shape, v.shape)
    shapes = d_out.shape, q.shape, k.shape, v.shape
    assert attention_backward_flops(d_out, q, k, v) == sdpa_backward_flop_count(*shapes)


def test_heads_of_keys_that_serve_several_queries_save_no_operation() -> None:
    q, k, v, d_out = (torch.empty(2, heads, 10, 16) for heads in (8, 2, 2, 8))
    whole = torch.empty(2, 8, 10, 16)
    assert attention_flops(q, k, v) == attention_flops(q, whole, whole)
    assert attention_backward_flops(d_out, q, k, v) == attention_backward_flops(d_out, q, whole, whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_batch_on_a_gpu_is_traced_as_one_on_a_cpu_cuda() -> None:
    batch = torch.ones(4, 8)
    assert known_batch({"x": batch.cuda()})["x"].device.type == "cpu"


def test_a_peak_is_forgotten_before_torch_has_asked_for_a_gpu() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test of this process has used the GPU")
    restart_peak(torch.device("cuda", 0))
    assert not torch.cuda.is_initialized()
