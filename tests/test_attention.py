"""The short backward pass of attention: torch's values to the bit, and gradients no further from the truth than torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rlhf_trust import attention
from rlhf_trust.decode import token_logps
from rlhf_trust.models import new_adapter
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def inputs(dtype, length=40, rows=3, heads=6, key_heads=2, size=16):
    torch.manual_seed(0)
    shapes = (heads, key_heads, key_heads)
    return [(2 * torch.randn(rows, n, length, size)).to(dtype).requires_grad_() for n in shapes]


def masks(length):
    """None (causal), and as transformers makes them: padding on the right, on the left (some rows see nothing), a sliding window."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    at = torch.arange(length)
    right, left = at < length - 7, at >= 7
    window = causal & (at[:, None] - at[None] < 5)
    added = torch.zeros(length, length).masked_fill(~window, torch.finfo(torch.float32).min)
    return {
        "causal": None,
        "right": (causal & right)[None, None],
        "left": (causal & left)[None, None],
        "window": window[None, None],
        "added": added[None, None],
    }


def grads(function, states, mask, upstream):
    module = SimpleNamespace(
        num_key_value_groups=states[0].shape[1] // states[1].shape[1], is_causal=True, training=True
    )
    out, _ = function(module, *states, mask, scaling=0.25)
    return out, torch.autograd.grad(out, states, upstream.to(out.dtype))


@pytest.mark.parametrize("queries", [16, 128])
@pytest.mark.parametrize("mask", masks(40))
def test_gradients_are_those_of_torch(mask, queries, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", queries)  # of 40: two blocks and a half
    monkeypatch.setattr(
        attention, "WEIGHTS_AT_ONCE", 4 * 3 * 16 * 40
    )  # of six key heads one, four or five at a time
    states = inputs(torch.float64)
    mask = masks(40)[mask]
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    upstream = torch.randn(3, 40, 6, 16, dtype=torch.float64)
    if (
        mask is not None and mask.dtype == torch.bool
    ):  # what sees nothing is padding, on which nothing depends
        upstream = upstream * mask.any(-1)[0, 0][None, :, None, None]
    out, found = grads(attention.attention, states, mask, upstream)
    theirs, expected = grads(sdpa_attention_forward, states, mask, upstream)
    assert torch.equal(out, theirs)
    for ours, reference in zip(found, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [96, 400])
def test_in_bfloat16_it_is_as_exact_as_torch(length):
    states = inputs(torch.bfloat16, length)
    upstream = torch.randn(3, length, 6, 16).bfloat16()
    exact = grads(
        sdpa_attention_forward,
        [s.detach().double().requires_grad_() for s in states],
        None,
        upstream,
    )[1]

    def error(found):
        return sum(((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact))

    ours, theirs = (
        error(grads(function, states, None, upstream)[1])
        for function in (attention.attention, sdpa_attention_forward)
    )
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("length", [30, 140])
def test_a_model_learns_what_it_would_learn_with_torchs_own(tiny, chat, length, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 100)
    ran, backward = [], attention._Attention.backward
    monkeypatch.setattr(
        attention._Attention,
        "backward",
        staticmethod(lambda *args: ran.append(1) or backward(*args)),
    )
    policy = new_adapter(tiny, 4, 8)
    weights = [p for name, p in policy.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1)
    sequences = [
        chat.sequence(("the question is " + "not wrong " * n,), "the answer")
        for n in (1, length // 10)
    ]

    def gradient():
        logps, _ = token_logps(policy, sequences, 0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), weights)])

    ours, layers = gradient(), len(ran)
    tiny.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, gradient(), rtol=1e-4, atol=1e-4)
    assert (
        layers
        == (
            tiny.model.config.num_hidden_layers
            if max(map(len, sequences)) <= attention.SHORT
            else 0
        )
        and len(ran) == layers
    )
