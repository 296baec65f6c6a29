"""The loop over new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_lora.tasks.rl.sampling.drawing import draw
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings
from lightning_lora.tasks.rl.sampling.stepping import Stepping
from lightning_lora.tasks.rl.sampling.stop_texts import StopTexts


@torch.no_grad()  # not inference mode: the learner differentiates functions of what comes out
def decode(
    model: nn.Module,
    prompts: Sequence[Tensor],
    group_size: int,
    settings: SamplingSettings,
    generator: torch.Generator,
    stop_ids: Sequence[int],
    *,
    limit: int | None = None,
    stop_texts: StopTexts | None = None,
    use_cache: bool = True,
    in_step: bool = False,
    on_tokens: Callable[[Tensor], bool] | None = None,
) -> Samples:
    """Continue prompts of any lengths, each until a stop token, a stop text or its most tokens.

    Every row has a random number for each step from the start, used or not: what a row becomes does not depend on when
    the others end. Rows that have ended are dropped once they are more than half.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompts: Tokens of each prompt, ``(length,)``, at least one, fewer than ``limit``.
        group_size: Completions of each prompt.
        settings: How tokens are drawn.
        generator: What is drawn from. Global generators stay as they are.
        stop_ids: Tokens that end a completion, and are its last one.
        limit: Positions of the model at most.
        stop_texts: Finds the texts that end a completion.
        use_cache: Whether keys and values of earlier tokens are kept.
        in_step: Whether all processes take as many steps as the longest completion of any of them, because each step
            gathers weights of all.
        on_tokens: Called with the new token of each row that is left, ``(rows,)``; if it returns True, all rows end.

    Returns:
        Completions of version 0.
    """
    rows = len(prompts) * group_size
    stepping = Stepping(model, limit, use_cache)
    device = stepping.device
    room = [settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - len(p)) for p in prompts]
    most = torch.tensor(room, device=device).repeat_interleave(group_size)
    width = _largest(max(room), device) if in_step else max(room)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    uniforms = torch.rand(width, rows, generator=generator, device=generator.device, dtype=torch.float32).to(device)

    tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, width, device=device, dtype=torch.float32)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    live = torch.arange(rows, device=device)  # the row of each line of the model's batch
    going = torch.ones_like(finished)  # of these lines

    logits = stepping.begin(list(prompts), group_size)
    for step in range(width):
        new, logprob = draw(logits, uniforms[step, live], settings)
        tokens[live, step] = torch.where(going, new, 0)
        logprobs[live, step] = torch.where(going, logprob, 0.0)
        lengths[live] += going
        ended = torch.isin(new, stops)
        if stop_texts is not None:
            ended |= torch.tensor(stop_texts.completed(tokens, live.tolist(), step), device=device)
        finished[live] |= going & ended
        going = going & ~ended & (most[live] > step + 1)
        left = int(going.sum())
        if on_tokens is not None and on_tokens(new):
            break
        if not (_largest(left, device) if in_step else left):
            break
        if 2 * left < len(live):
            # A process whose rows have all ended keeps one, to step with the others.
            lines = going.nonzero().squeeze(-1) if left else live.new_zeros(1)
            live, going, new = live[lines], going[lines], new[lines]
            stepping.keep(lines)
        logits = stepping.next(new)
    used = int(lengths.max())
    return Samples(tokens[:, :used], logprobs[:, :used], lengths, finished, 0)


def _largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
