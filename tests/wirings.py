"""Small causal models of wirings that transformers does not carry, and of one that nobody does.

Baichuan fuses queries, keys and values in one projection, [q; k; v]; its larger variant adds ALiBi to the mask that the
model hands to every layer. ChatGLM lays q, k and v of each head side by side and scales its residual stream; ChatGLM2
has KV groups, a fused gate and up, and turns half of each head in neighbouring pairs.
"""

from collections.abc import Callable
from functools import partial

import torch
from families import VOCABULARY, Family, Units
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HIDDEN, HEADS, FFN, LAYERS = 64, 8, 96, 2

Turn = Callable[[Tensor], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, implementation: str) -> Tensor:
    """Attention, (batch, head, seq, d_head) each, with a bias that is added to the scores."""
    if implementation == "sdpa":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores + bias).softmax(-1) @ value


def causal(x: Tensor) -> Tensor:
    """Bias (seq, seq) that hides what comes later."""
    return x.new_full((x.shape[1], x.shape[1]), -1e9).triu(1)


def angles(x: Tensor, seq: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (seq, width // 2) of rotary positions."""
    speed = 100.0 ** (-torch.arange(0, width, 2, dtype=x.dtype, device=x.device) / width)
    angle = torch.arange(seq, dtype=x.dtype, device=x.device)[:, None] * speed
    return angle.cos(), angle.sin()


def turn_halves(x: Tensor) -> Tensor:
    """Rotary positions on (batch, head, seq, d_head): the first half is paired with the second."""
    cos, sin = angles(x, *x.shape[-2:])
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


def turn_pairs_of_first_half(x: Tensor) -> Tensor:
    """Rotary positions on the first half of each head: neighbours are paired; the rest stays."""
    turned, rest = x.chunk(2, -1)
    pairs = turned.unflatten(-1, (-1, 2))
    cos, sin = angles(x, x.shape[-2], turned.shape[-1])
    one, other = pairs[..., 0], pairs[..., 1]
    return torch.cat((torch.stack((one * cos - other * sin, other * cos + one * sin), -1).flatten(-2), rest), -1)


class Packed(nn.Module):
    """Baichuan's attention: one projection gives all queries, then all keys, then all values."""

    def __init__(self, turn: Turn, implementation: str):
        super().__init__()
        self.turn, self.implementation = turn, implementation
        self.hidden_size, self.num_heads, self.head_dim = HIDDEN, HEADS, HIDDEN // HEADS
        self.W_pack = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        packed = self.W_pack(x).unflatten(-1, (3, self.hidden_size)).movedim(-2, 0)  # (3, batch, seq, heads of d_head)
        query, key, value = (t.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2) for t in packed)
        mixed = attend(self.turn(query), self.turn(key), value, bias, self.implementation)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, self.hidden_size))


class SideBySide(nn.Module):
    """ChatGLM's attention: q, k and v of one head are neighbours in the projection."""

    def __init__(self, implementation: str):
        super().__init__()
        self.implementation = implementation
        self.num_attention_heads, self.hidden_size_per_attention_head = HEADS, HIDDEN // HEADS
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = (self.num_attention_heads, 3 * self.hidden_size_per_attention_head)
        fused = self.query_key_value(x).view(*x.shape[:-1], *heads).transpose(1, 2)
        query, key, value = fused.chunk(3, -1)
        turn = turn_pairs_of_first_half
        mixed = attend(turn(query), turn(key), value, bias, self.implementation).transpose(1, 2)
        return self.dense(mixed.flatten(-2))


class Grouped(nn.Module):
    """ChatGLM2's attention: all queries, then a few keys and values that groups of queries share."""

    def __init__(self, groups: int, implementation: str):
        super().__init__()
        self.implementation = implementation
        self.num_heads, self.num_groups, self.d_head = HEADS, groups, HIDDEN // HEADS
        self.query_key_value = nn.Linear(HIDDEN, (HEADS + 2 * groups) * self.d_head)
        self.dense = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        few = self.num_groups * self.d_head
        parts = self.query_key_value(x).split([self.num_heads * self.d_head, few, few], -1)
        query, key, value = (part.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in parts)
        query, key = turn_pairs_of_first_half(query), turn_pairs_of_first_half(key)
        key, value = (self._widened(t) for t in (key, value))
        mixed = attend(query, key, value, bias, self.implementation).transpose(1, 2)
        return self.dense(mixed.reshape(*x.shape[:-1], self.num_heads * self.d_head))

    def _widened(self, heads: Tensor) -> Tensor:
        batch, groups, seq, width = heads.shape
        copies = heads.unsqueeze(2).expand(-1, -1, self.num_heads // self.num_groups, -1, -1)
        return copies.contiguous().view(batch, self.num_heads, seq, width)


class Gated(nn.Module):
    """Gate and up apart, as in Baichuan."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, FFN, bias=False), nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    """Gate and up in one projection, as in ChatGLM2."""

    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(HIDDEN, 2 * FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class Block(nn.Module):
    """Attention and FFN on one residual stream."""

    def __init__(self, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.before, self.between = LlamaRMSNorm(HIDDEN), LlamaRMSNorm(HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), bias)
        return x + self.mlp(self.between(x))


class ScaledBlock(nn.Module):
    """ChatGLM's layer: what is added to is the normed stream, scaled up by the depth."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.alpha = attention, (2 * LAYERS) ** 0.5
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
        self.before, self.between = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.before(x)
        x = self.between(x * self.alpha + self.attention(x, bias))
        return x * self.alpha + self.mlp(x)


class Wired(nn.Module):
    """Embedding, layers, norm and head; with `slopes`, ALiBi is made here and handed down with the mask."""

    def __init__(self, layers: list[nn.Module], slopes: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.slopes = slopes

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        bias = causal(x)
        if self.slopes:
            slope = 2.0 ** -torch.arange(1, HEADS + 1, dtype=x.dtype, device=x.device)
            bias = bias + slope[:, None, None] * torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        for layer in self.layers:
            x = layer(x, bias)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))


class Gates(nn.Module):
    """Attention that no one listed: a temperature and a gate a head, and values that the first layer has a say in."""

    def __init__(self, implementation: str, kv_heads: int = 4):
        super().__init__()
        self.implementation, self.heads, self.kv_heads, width = implementation, HEADS, kv_heads, HIDDEN // HEADS
        self.query, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.key, self.value = nn.Linear(HIDDEN, kv_heads * width), nn.Linear(HIDDEN, kv_heads * width)
        self.gate = nn.Linear(HIDDEN, HEADS)
        self.temperature = nn.Parameter(torch.ones(HEADS))
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, bias: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (t.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for t in (self.key(x), self.value(x)))
        mixed = value if first is None else value * self.share + first * (1 - self.share)
        copies = self.heads // self.kv_heads
        key, wide = (t.repeat_interleave(copies, 1) for t in (turn_halves(key), mixed))
        query = turn_halves(query) * self.temperature[:, None, None]
        heads = attend(query, key, wide, bias, self.implementation).transpose(1, 2)
        return self.out((heads * self.gate(x).sigmoid()[..., None]).flatten(-2)), value


class Sandwich(nn.Module):
    """A layer with norms before and after, which takes and returns the values of the first."""

    def __init__(self, implementation: str):
        super().__init__()
        self.attention, self.mlp = Gates(implementation), Gated()
        self.norms = nn.ModuleList(LlamaRMSNorm(HIDDEN) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, value = self.attention(self.norms[0](x), bias, first)
        x = x + self.norms[1](mixed)
        return x + self.norms[3](self.mlp(self.norms[2](x))), value if first is None else first


class MadeUp(Wired):
    """Hands the values of the first layer to all others."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x, first = self.embed_tokens(input_ids), None
        bias = causal(x)
        for layer in self.layers:
            x, first = layer(x, bias, first)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))


def _stacked(layer: Callable[[str], nn.Module], model: Callable[..., nn.Module] = Wired) -> Callable[[str], nn.Module]:
    return lambda implementation: model([layer(implementation) for _ in range(LAYERS)])


MULTI_HEAD: Units = {"kv_head": (8,), "ffn_channel": (96,), "block": (1, 1), "layer": (1,)}
GROUPED: Units = {**MULTI_HEAD, "kv_head": (2,), "query_head": (8,)}
# the values of the first layer reach all others: a KV head goes in all layers at once, and what returns them stays
ACROSS: Units = {"query_head": (8,), "ffn_channel": (96,), "block": (1,)}

WIRINGS = {
    family.name: family
    for family in (
        Family("baichuan", _stacked(lambda how: Block(Packed(turn_halves, how), Gated())), (MULTI_HEAD,) * LAYERS),
        Family("baichuan_alibi", _stacked(lambda how: Block(Packed(nn.Identity(), how), Gated()),
                                          partial(Wired, slopes=True)), (MULTI_HEAD,) * LAYERS, ordered=True),
        # its layers return the normed stream, scaled, when their parameters are zero: none is one that may go
        Family("chatglm", _stacked(lambda how: ScaledBlock(SideBySide(how))), ({**MULTI_HEAD, "layer": ()},) * LAYERS),
        Family("chatglm2", _stacked(lambda how: Block(Grouped(2, how), Fused())), (GROUPED,) * LAYERS),
        Family("made_up", _stacked(Sandwich, MadeUp), (ACROSS,) * LAYERS,
               spanning={"hidden~": (64,), "kv_head": (4,)}),
    )
}  # fmt: skip
