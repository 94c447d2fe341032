"""A random model with preferences, and the layouts in which it comes: what the tests of decoding write with."""
from __future__ import annotations

import torch

from slm.config import ModelConfig
from slm.model import TransformerLM

SHAPES = {
    "llama": dict(n_kv_head=2), "mqa": dict(n_kv_head=1, qk_norm=True), "alibi": dict(position="alibi"), "tied": dict(tie_embeddings=True),
    "learned": dict(position="learned", norm="layernorm", ffn="gelu", bias=True), "window": dict(sliding_window=8),
    "none": dict(position="none", norm_position="post"), "softcap": dict(logit_softcap=20.0),
}


def babbler(vocab_size: int, context_length: int, seed: int = 0, **shape) -> TransformerLM:
    """A random model whose scores are turned up until it has preferences."""
    torch.manual_seed(seed)
    usual = dict(n_layer=2, n_head=4, d_model=32, tie_embeddings=False)
    model = TransformerLM(ModelConfig(vocab_size=vocab_size, context_length=context_length, **{**usual, **shape})).eval()
    with torch.no_grad():
        (model.embed if model.head is None else model.head).weight.mul_(20 if model.head is None else 3)
    return model
