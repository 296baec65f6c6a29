"""Estimates of the divergence of a policy from its reference, from the tokens that the policy has sampled."""

from __future__ import annotations

from torch import Tensor

from lightning_lora.errors import check_choice

KL_KINDS = ("k1", "k2", "k3", "k3+")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    r"""Estimate ``KL(policy | reference)`` from each token, in the shape of ``logprobs``, nats.

    With ``x = logprobs - ref_logprobs``:

    ======== ======================== ====================== =======================================================
    kind     value                    expected value         expected gradient, as a term of the loss
    ======== ======================== ====================== =======================================================
    ``k1``   ``x``                    exact                  zero: use it in the reward only
    ``k2``   ``x^2 / 2``              biased                 exact
    ``k3``   ``exp(-x) + x - 1``      exact, never negative  wrong: that of another divergence
    ``k3+``  that of ``k3``           exact, never negative  exact: that of ``k2``
    ======== ======================== ====================== =======================================================

    Args:
        logprobs: Log-probabilities of tokens, by the policy that has sampled them, nats.
        ref_logprobs: Log-probabilities of the same tokens by the reference, of the same shape.
        kind: The estimate.

    Raises:
        ConfigError: If the kind is unknown.

    References:
        Schulman, http://joschu.net/blog/kl-approx.html; gradients: https://arxiv.org/abs/2505.17508
    """
    check_choice("kl", kind, KL_KINDS)
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    k2 = x.square() / 2
    if kind == "k2":
        return k2
    k3 = (-x).exp() + x - 1
    return k3 if kind == "k3" else k3.detach() + (k2 - k2.detach())
