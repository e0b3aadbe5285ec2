"""Causal attention with a backward pass that suits short texts on a processor.

torch's fused attention for processors spends most of its time in the backward pass: at the hundred tokens of a preference
pair that pass alone is a sixth of a LoRA training step, at five hundred of an answer from documents three tenths. Here the forward
pass is torch's, to the bit, and the backward pass computes the weights anew, a block of queries at a time, with one matrix
product for all query heads that share a key head. Scores and softmax are in float32, as in the fused pass; against float64 the
gradients in bfloat16 are as exact as its own (tests/test_attention.py).
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_short_backward"
"""What transformers calls it: ``model.set_attn_implementation(attention.NAME)``."""

SHORT = 1024
"""Longest text, in tokens, for which it was measured to gain: of the backward pass's time, more than half at 100 tokens, a third at 500,
a tenth at 800, nothing at 1200."""

QUERIES_AT_ONCE = 128
"""Positions whose queries go together: each such block leaves out the keys after it."""

WEIGHTS_AT_ONCE = 1 << 18
"""Attention weights in memory at a time: few enough to stay in a processor's cache from one operation to the next."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scaling, call):
        out = call(query, key, value)
        ctx.save_for_backward(query, key, value, mask, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, mask, out = ctx.saved_tensors
        (rows, heads, length, size), key_heads = query.shape, key.shape[1]
        pairs, group = (
            rows * key_heads,
            heads // key_heads,
        )  # the queries of all heads that share a key head go into one matrix
        k, v = key.reshape(pairs, length, size), value.reshape(pairs, length, size)
        q, out, gradient = (
            x.reshape(pairs, group, length, size)
            for x in (query, out.transpose(1, 2), gradient.transpose(1, 2))
        )
        # What the softmax takes off every weight's gradient: a row of weights sums to one, whatever the scores.
        taken = (gradient.float() * out.float()).sum(-1, keepdim=True)
        of_query, (of_key, of_value) = (
            torch.empty_like(q),
            torch.zeros(2, pairs, length, size, device=q.device),
        )
        hidden = _hidden(mask, rows, key_heads, length, q.device)
        for start in range(0, length, QUERIES_AT_ONCE):
            asking = slice(start, min(start + QUERIES_AT_ONCE, length))
            seen = slice(0, asking.stop if mask is None else length)  # nobody looks ahead
            added = hidden[:, asking, seen].repeat(1, group, 1).expand(pairs, -1, -1)
            at_once = max(1, WEIGHTS_AT_ONCE // added[0].numel())
            for part in (slice(first, first + at_once) for first in range(0, pairs, at_once)):
                q_, gradient_, taken_ = (
                    x[part, :, asking].flatten(1, 2) for x in (q, gradient, taken)
                )
                k_, v_ = k[part, seen], v[part, seen]
                weights = torch.baddbmm(
                    added[part], q_.float(), k_.float().mT, alpha=ctx.scaling
                ).softmax(-1)
                if mask is not None:
                    weights.nan_to_num_(0.0)  # a row that sees nothing
                of_value[part, seen] += torch.bmm(weights.to(v.dtype).mT, gradient_)
                of_scores = weights.mul_(torch.bmm(gradient_, v_.mT) - taken_).to(q.dtype)
                of_query[part, :, asking] = torch.bmm(of_scores, k_).unflatten(1, (group, -1))
                of_key[part, seen] += torch.bmm(of_scores.mT, q_)
        of_query, of_key = of_query.mul_(ctx.scaling), of_key.mul_(ctx.scaling)
        return (
            of_query.view_as(query),
            of_key.to(key.dtype).view_as(key),
            of_value.to(value.dtype).view_as(value),
            None,
            None,
            None,
        )


def _hidden(
    mask: torch.Tensor | None, rows: int, key_heads: int, length: int, device
) -> torch.Tensor:
    """What a mask adds to the scores, in float32: [1 or rows · key heads, length, length]."""
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill_(~mask, -torch.inf)
    mask = mask.float()[:, 0]
    return mask if len(mask) == 1 else mask.repeat_interleave(key_heads, 0)


def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """transformers' attention function: query [rows, heads, length, size], key and value [rows, key heads, length, size] →
    ([rows, length, heads, size], None). Where there is nothing to gain it is transformers' own ``sdpa``."""

    def call(query, key, value):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    gains = (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2] <= SHORT
        and dropout == 0
        and (causal if attention_mask is None else attention_mask.shape[1] == 1)
        and kwargs.get("position_bias") is None
    )
    if not gains:
        return call(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(
        query, key, value, attention_mask, scaling, lambda *states: call(*states)[0]
    ), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
