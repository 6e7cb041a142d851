"""An initialisation that can copy from the first step on.

A small transformer spends most of its first hour on finding out that what follows a token earlier
tends to follow it again. The circuit it ends up with is known (Olsson et al., 2022, "In-context
learning and induction heads") and simple enough to be written into the weights: a head that tells
each position which token came before it, and in the next layer a head that looks for positions
which were preceded by the present token, and repeats what stands there. Training goes on from
there and may change all of it.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

CIRCUITS = 2  # pairs of heads, each comparing another projection of the token
SHARPNESS = 7.0  # of the attention to the previous position
MATCH = 5.0  # of the attention to positions that follow the present token
GAIN = 8.0  # of what is repeated
SPREAD = 0.1  # standard deviation of the token embeddings


@torch.no_grad()
def wire_induction(model: LlamaForCausalLM, *, seed: int = 0) -> None:
    """Write two induction circuits into the first two layers of a fresh Llama.

    The residual stream is divided: its first half holds the token, the next dimensions the token
    before it, and the last one a constant. Rotary positions rotate pair m of a head by ω_m a step,
    so with q = u and k = R(ω)u the score at offset Δ is Σ_m cos(ω_m (Δ - 1)): highest at Δ = 1.
    Contents are compared in the pairs that hardly turn within a conversation.

    Args:
        model: A model with an even number of at least four heads and tied embeddings.
        seed: Seed of the embeddings and of the compared projections.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    token = config.hidden_size // 2
    width = config.hidden_size // config.num_attention_heads
    pairs = width // 2
    turn = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    slow = [m for m in range(pairs) if turn[m] < 4e-3]
    compared = [*slow, *(m + pairs for m in slow)]
    n = len(compared)

    embeddings = model.model.embed_tokens.weight
    embeddings[:, :token] = torch.randn(len(embeddings), token, generator=generator) * SPREAD
    embeddings[:, token:] *= 0.1
    embeddings[:, -1] = 2 * SPREAD

    at_one = torch.zeros(2, width)
    for m in range(5):  # the pairs that turn fast tell neighbours apart
        at_one[0, m] = 1.0
        at_one[1, m], at_one[1, m + pairs] = math.cos(turn[m]), math.sin(turn[m])

    previous, induction = (model.model.layers[i].self_attn for i in (0, 1))
    for circuit in range(CIRCUITS):
        head = torch.arange(width) + circuit * width
        for layer in (previous, induction):  # quiet the noise that stands there
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
                projection.weight[head] *= 0.1
            layer.o_proj.weight[:, head] *= 0.1
        square = torch.randn(token, token, generator=generator)
        projected = torch.linalg.qr(square)[0][:n]
        before = token + circuit * n + torch.arange(n)

        previous.q_proj.weight[head, -1] += SHARPNESS / 2 * at_one[0]
        previous.k_proj.weight[head, -1] += SHARPNESS / 2 * at_one[1]
        previous.v_proj.weight[head[:n], :token] += projected
        previous.o_proj.weight[before, head[:n]] += 1.0

        induction.q_proj.weight[head[compared], :token] += MATCH * projected
        induction.k_proj.weight[head[compared], before] += MATCH
        induction.v_proj.weight[head, head] += 1.0
        induction.o_proj.weight[head, head] += GAIN
