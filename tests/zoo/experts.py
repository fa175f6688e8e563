"""Mixtures of experts: routed, shared, one module per expert or one tensor for all; attention with shared latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, tokens

WIDTH, INNER, EXPERTS_COUNT = 16, 24, 4


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Network(nn.Module):
    """A stem, a mixture with a skip, a head; ``mix`` gets tokens as rows."""

    def __init__(self, experts: int = EXPERTS_COUNT) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, WIDTH), nn.RMSNorm(WIDTH)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts_count = experts
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows = self.norm(x).reshape(-1, x.shape[-1])
        return self.head(x + self.mix(rows).view(x.shape))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# ---------------------------------------------------------------- a module per expert


class Switch(Network):
    """Every token goes to one expert, scaled by its probability."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(self.experts_count))

    def mix(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            out[mask] = expert(x[mask]) * weight[mask, None]
        return out


class Mixtral(Network):
    """Every token goes to two experts; an expert that gets none does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(self.experts_count))

    def scores(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)

    def mix(self, x: Tensor) -> Tensor:
        weights, chosen = self.scores(x).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        masks = F.one_hot(chosen, self.experts_count).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            place, row = torch.where(masks[number])
            if len(row) == 0:
                continue
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
        return out


class RarelyChosen(Mixtral):
    """So many experts that one pass over ten tokens leaves some without any."""

    def __init__(self) -> None:
        Network.__init__(self, 16)
        self.experts = nn.ModuleList(Expert(6) for _ in range(16))


class NeverChosen(Mixtral):
    """An expert that nothing can reach is not understood, and what is around it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("penalty", torch.tensor([0.0, 0.0, 0.0, 1e6]))

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x) - self.penalty


class SharedExpert(Mixtral):
    """One more expert sees every token, behind a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.shared_gate = Expert(12), nn.Linear(WIDTH, 1)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class ExpertChoice(Network):
    """Experts choose tokens instead of tokens experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(self.experts_count))

    def mix(self, x: Tensor) -> Tensor:
        weights, rows = self.router(x).softmax(-1).t().topk(4)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out.index_add(0, rows[number], expert(x[rows[number]]) * weights[number, :, None])
        return out


# ---------------------------------------------------------------- a tensor for all experts


class Fused(Network):
    """``gate_up (experts, width, 2 inner)`` and ``down (experts, inner, width)``."""

    def __init__(self, inner: int = INNER, experts: int = EXPERTS_COUNT) -> None:
        super().__init__(experts)
        self.gate_up = nn.Parameter(torch.randn(experts, WIDTH, 2 * inner) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, inner, WIDTH) * 0.2)

    def top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return weights / weights.sum(-1, keepdim=True), chosen


class BatchedExperts(Fused):
    """Every expert computes every token; weights of those not chosen are 0."""

    def mix(self, x: Tensor) -> Tensor:
        weights, chosen = self.top(x)
        gates = x.new_zeros(len(x), self.experts_count).scatter(1, chosen, weights)
        repeated = x.expand(self.experts_count, -1, -1)
        gate, up = torch.bmm(repeated, self.gate_up).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, self.down)
        return (out * gates.t()[..., None]).sum(0)


class GatheredExperts(Fused):
    """The matrices of each token's experts are gathered."""

    def mix(self, x: Tensor) -> Tensor:
        weights, chosen = self.top(x)
        gate, up = torch.einsum("td,tkdh->tkh", x, self.gate_up[chosen]).chunk(2, -1)
        out = torch.einsum("tkh,tkhd->tkd", F.silu(gate) * up, self.down[chosen])
        return (out * weights[..., None]).sum(1)


class GroupedExperts(Fused):
    """Rows sorted by expert and one grouped matmul, whose kernel wants rows of whole 16 bytes."""

    def mix(self, x: Tensor) -> Tensor:
        weights, chosen = self.top(x)
        order = chosen.flatten().argsort(stable=True)
        rows = torch.div(order, chosen.shape[1], rounding_mode="floor")
        ends = torch.histc(chosen.flatten().float(), self.experts_count, 0, self.experts_count - 1)
        ends = ends.cumsum(0).to(torch.int32)
        gate, up = self.product(x[rows], self.gate_up, ends).chunk(2, -1)
        out = self.product(F.silu(gate) * up, self.down, ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, rows, out)

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight, offs=ends)


class GroupedTransposed(GroupedExperts):
    """Weights lie as ``(experts, out, in)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(self.gate_up.detach().transpose(1, 2).contiguous())
        self.down = nn.Parameter(self.down.detach().transpose(1, 2).contiguous())

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)


class GroupLimited(Fused):
    """Sigmoid scores, a bias that only chooses, the best two of four groups of experts (DeepSeek-V3)."""

    def __init__(self) -> None:
        super().__init__(experts=8)
        self.register_buffer("correction", torch.randn(8) * 0.1)

    def top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.router(x))
        choice = scores + self.correction
        best = choice.view(len(x), 4, -1).topk(2)[0].sum(-1).topk(2, sorted=False)[1]
        allowed = x.new_zeros(len(x), 4).scatter(1, best, 1.0)
        mask = allowed[..., None].expand(-1, -1, 2).reshape(len(x), -1).bool()
        chosen = choice.masked_fill(~mask, 0.0).topk(2, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, chosen

    mix = GatheredExperts.mix


class ReluTop(GatheredExperts):
    """Scores that are 0 where the router's row is, and the largest two of them."""

    def top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = F.relu(self.router(x)).topk(2)
        return weights, chosen


# ---------------------------------------------------------------- every expert sees every token


class Dense(Fused):
    """``gates`` says how much of each expert a token gets."""

    def __init__(self) -> None:
        super().__init__(experts=6)

    def mix(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("td,edh->eth", x, self.gate_up).chunk(2, -1)
        out = torch.einsum("eth,ehd->etd", F.silu(gate) * up, self.down)
        return torch.einsum("etd,te->td", out, self.gates(x))

    def gates(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class SigmoidGates(Dense):
    """An expert that gives zero can leave: no other expert hears of its gate."""

    def gates(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.router(x))


class NormalizedRelu(Dense):
    """An expert whose row of the router is zero has the gate 0, which adds nothing to the sum of gates."""

    def gates(self, x: Tensor) -> Tensor:
        gates = F.relu(self.router(x))
        return gates / (gates.sum(-1, keepdim=True) + 1e-3)


class NormalizedSigmoid(Dense):
    """The gate of a zero row is one half, so the other experts would get more without it."""

    def gates(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.router(x))
        return gates / gates.sum(-1, keepdim=True)


class SoftmaxGates(Dense):
    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)


class SoftMixture(Network):
    """Slots are averages of tokens, tokens averages of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(self.experts_count))
        self.slots = nn.Parameter(torch.randn(WIDTH, self.experts_count, 2))

    def mix(self, x: Tensor) -> Tensor:
        scores = torch.einsum("td,dep->tep", x, self.slots)
        dispatch, combine = scores.softmax(0), scores.flatten(1).softmax(-1)
        inner = torch.einsum("td,tep->epd", x, dispatch)
        out = torch.stack([expert(inner[number]) for number, expert in enumerate(self.experts)])
        return combine @ out.flatten(0, 1)


# ---------------------------------------------------------------- attention with shared latents


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LatentAttention(nn.Module):
    """Queries, keys and values come from narrow latents; one rotary key serves all heads (DeepSeek)."""

    def __init__(self, heads: int = 4, q_rank: int = 12, kv_rank: int = 10) -> None:
        super().__init__()
        self.heads, self.plain, self.rotary, self.value, self.kv_rank = heads, 6, 4, 8, kv_rank
        self.stem, self.norm = nn.Linear(8, WIDTH), nn.RMSNorm(WIDTH)
        self.q_a, self.q_norm = nn.Linear(WIDTH, q_rank, bias=False), nn.RMSNorm(q_rank)
        self.q_b = nn.Linear(q_rank, heads * (self.plain + self.rotary), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(WIDTH, kv_rank + self.rotary, bias=False), nn.RMSNorm(kv_rank)
        self.kv_b = nn.Linear(kv_rank, heads * (self.plain + self.value), bias=False)
        self.o, self.head = nn.Linear(heads * self.value, WIDTH, bias=False), nn.Linear(WIDTH, 3)
        angle = torch.arange(32.0)[:, None] * torch.logspace(0, -2, self.rotary // 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1), persistent=False)
        self.scaling = (self.plain + self.rotary) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        b, n = y.shape[:2]
        cos, sin = self.cos[:n], self.sin[:n]
        q = self.q_b(self.q_norm(self.q_a(y))).view(b, n, self.heads, self.plain + self.rotary).transpose(1, 2)
        q_plain, q_rotary = q.split([self.plain, self.rotary], -1)
        latent, k_rotary = self.kv_a(y).split([self.kv_rank, self.rotary], -1)
        kv = self.kv_b(self.kv_norm(latent)).view(b, n, self.heads, self.plain + self.value).transpose(1, 2)
        k_plain, v = kv.split([self.plain, self.value], -1)
        k_rotary = rotate(k_rotary[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_plain, rotate(q_rotary, cos, sin)], -1)
        k = torch.cat([k_plain, k_rotary], -1)
        weights = (q @ k.transpose(-1, -2) * self.scaling).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.value)
        return self.head(x + self.o(out))


class SharedKeysAndValues(nn.Module):
    """Two attentions over the keys and values of the first; one projection is key and value at once."""

    def __init__(self, heads: int = 6, kv_heads: int = 2, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.stem = nn.Linear(8, WIDTH)
        self.q1, self.q2 = nn.Linear(WIDTH, heads * head_dim), nn.Linear(WIDTH, heads * head_dim)
        self.kv = nn.Linear(WIDTH, kv_heads * head_dim)
        self.o1, self.o2 = nn.Linear(heads * head_dim, WIDTH), nn.Linear(heads * head_dim, WIDTH)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        b, n = q.shape[:2]
        q = q.view(b, n, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, kv, kv, scale=0.4, enable_gqa=True)
        return out.transpose(1, 2).reshape(b, n, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        b, n = x.shape[:2]
        kv = self.kv(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        x = x + self.o1(self.attend(self.q1(x), kv))
        x = x + self.o2(self.attend(self.q2(x), kv))
        return self.head(x)


_SOFTMAX = "a zero still counts in a softmax over this dim"  # why experts stay

EXPERTS: dict[str, Case] = {
    "switch": Case(Switch, tokens(8), 4 * INNER, _SOFTMAX, wide=4 * INNER + WIDTH),
    "mixtral": Case(Mixtral, tokens(8), 4 * INNER, _SOFTMAX, wide=4 * INNER + WIDTH),
    "rarely_chosen": Case(RarelyChosen, tokens(8), 16 * 6, _SOFTMAX, wide=16 * 6 + WIDTH),
    "never_chosen": Case(NeverChosen, tokens(8), 0, "whether experts.3.down.weight and others run"),
    "shared_expert": Case(SharedExpert, tokens(8), 4 * INNER + 12, _SOFTMAX, wide=4 * INNER + 12 + WIDTH),
    "expert_choice": Case(ExpertChoice, tokens(8), 4 * INNER, _SOFTMAX, wide=4 * INNER + WIDTH),
    "batched_experts": Case(BatchedExperts, tokens(8), INNER, "is written at given positions", wide=INNER + WIDTH),
    "gathered_experts": Case(GatheredExperts, tokens(8), INNER, "its entries are chosen by data", wide=INNER + WIDTH),
    "grouped_experts": Case(GroupedExperts, tokens(8), INNER, "groups are chosen by data", wide=INNER + WIDTH),
    "grouped_transposed": Case(GroupedTransposed, tokens(8), INNER, "groups are chosen by data", wide=INNER + WIDTH),
    "group_limited": Case(GroupLimited, tokens(8), INNER, "its entries are chosen by data", wide=INNER + WIDTH),
    "relu_top": Case(ReluTop, tokens(8), INNER, "the largest of this dim are picked", wide=INNER + WIDTH),
    "sigmoid_gates": Case(SigmoidGates, tokens(8), INNER + 6, wide=INNER + 6 + WIDTH),
    "normalized_relu": Case(NormalizedRelu, tokens(8), INNER + 6, wide=INNER + 6 + WIDTH),
    "normalized_sigmoid": Case(
        NormalizedSigmoid, tokens(8), INNER, "a removed unit does not become 0 before aten.sum", wide=INNER + WIDTH
    ),
    "softmax_gates": Case(SoftmaxGates, tokens(8), INNER, _SOFTMAX, wide=INNER + WIDTH),
    "soft_mixture": Case(SoftMixture, tokens(8), 4 * INNER, wide=4 * INNER + WIDTH),
    # heads and both ranks; positions: plain, rotary pairs, values
    "latent_attention": Case(LatentAttention, tokens(8), 4 + 12 + 10, wide=4 + 12 + 10 + 6 + 2 + 8 + WIDTH),
    "shared_keys_and_values": Case(SharedKeysAndValues, tokens(8), 2, wide=2 + 4 + WIDTH),
}
