"""How do chosen tokens get more, or other, weights of a linear layer, and only they pay for it?

Shapes: n tokens of the batch, K of them chosen, C channels in, F channels out, R rank.

Chosen tokens are gathered, computed apart and put back. What is added (partial LoRA) or stands for
the layer (a visual expert) costs time in proportion to K.

Surprises:
- Nothing is written in place: that would break on views, and under torch.compile.
- No branch looks at K while training: a module that meets no token still takes part, and its
  gradients are zeros, as ZeRO-3 and DDP need it of every rank.
- The second matrix of a `LowRank` begins as zeros. In the reference it does not (its
  `reset_parameters` asks for an attribute that is spelt differently), which no one wants.

Follows the class PLoRA of InternLM/InternLM-XComposer (`build_mlp.py`); section 3.2 of
arXiv:2401.16420.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from connectors.beside_linears import published_modules
from connectors.fusion import Role
from connectors.key_table import GroupedHeads, KeyTable, Layout, Repeated


class LowRank(nn.Module):
    """Two linear layers without bias, C -> R -> F, the second begun as zeros."""

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        """Build the layers.

        Args:
            in_dim: C.
            out_dim: F.
            rank: R.
            alpha: the result is scaled by alpha / rank.
            dropout: share of the inputs that is dropped in training.
        """
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (K, C) to (K, F)."""
        return self.up(self.down(self.dropout(x))) * self.scale


class TokenRoutedLinear(nn.Module):
    """A linear layer, and a module that adds to it, or stands for it, at chosen tokens."""

    def __init__(self, base: nn.Module, expert: nn.Module, *, replaces: bool = False) -> None:
        """Join the two.

        Args:
            base: maps (..., C) to (..., F).
            expert: maps (K, C) to (K, F).
            replaces: whether chosen tokens do without `base`.
        """
        super().__init__()
        self.base = base
        self.expert = expert
        self.replaces = replaces

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Map (..., C) to (..., F); `rows` (K,) are the chosen tokens' places among all n."""
        flat = x.flatten(0, -2)
        if self.replaces:
            others = other_rows(rows, len(flat))
            rest = self.base(flat.index_select(0, others))
            out = join_rows(rest, others, run_rows(self.expert, flat, rows), rows)
        else:
            out = add_rows(self.base(flat), run_rows(self.expert, flat, rows), rows)
        return out.unflatten(0, x.shape[:-1])


def run_rows(expert: nn.Module, flat: Tensor, rows: Tensor) -> Tensor:
    """Return (K, F), what `expert` makes of tokens `rows` (K,) of (n, C)."""
    return expert(flat if len(rows) == len(flat) else flat.index_select(0, rows))


def add_rows(out: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return (n, F): `out` (n, F) with `own` (K, F) added at its tokens `rows` (K,).

    `rows` rise, so that K = n means all in order; then, and where K = 0 and nothing is to be
    trained, `out` is not copied.
    """
    own = own.to(out.dtype)
    if len(rows) == len(out):
        return out + own
    if len(rows) == 0 and not own.requires_grad:
        return out
    return out.index_add(0, rows, own)


def other_rows(rows: Tensor, count: int) -> Tensor:
    """Return the tokens of `count` that are not in `rows` (K,): (count - K,), rising."""
    others = torch.ones(count, dtype=torch.bool, device=rows.device)
    return others.index_fill(0, rows, False).nonzero()[:, 0]


def join_rows(rest: Tensor, others: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return (n, F) out of `rest` (n - K, F) at tokens `others` and `own` (K, F) at `rows`."""
    places = torch.cat([others, rows])
    order = torch.empty_like(places).scatter(
        0, places, torch.arange(len(places), device=places.device)
    )
    return torch.cat([rest, own.to(rest.dtype)]).index_select(0, order)


# XComposer2's names of the linear layers of a decoder layer, and what each computes.
_LINEARS: dict[str, tuple[Role, ...]] = {
    "attention.wqkv": ("q", "k", "v"),
    "attention.wo": ("o",),
    "feed_forward.w1": ("gate",),
    "feed_forward.w3": ("up",),
    "feed_forward.w2": ("down",),
}


def partial_lora_keys(
    layers: Sequence[Mapping[Role, str]], num_key_heads: int, head_dim: int
) -> dict[str, KeyTable]:
    """Return {format: {published key: ours}} of XComposer2's checkpoints: small matrices only.

    Its `wqkv` makes queries, keys and values in groups of heads. Each of ours gets the first matrix
    whole, and its rows of the second.

    Args:
        layers: of each decoder layer, {role: name of our `LowRank` and a dot}, such as {"q":
            "layers.0.self_attn_q_proj."}. Roles that are left out have no small matrices.
        num_key_heads: heads of the keys.
        head_dim: channels of a head.

    Returns:
        Nothing where a host joins layers that have small matrices of their own in the checkpoints,
        or joins queries, keys and values, whose rows stand there in another order.
    """
    modules = published_modules(layers, _LINEARS)
    keys: dict[str, str | Layout] = {}
    if modules is None:
        return {}
    for place, ours in modules.items():
        first, second = f"{place}.Plora_A.weight", f"{place}.Plora_B.weight"
        downs, ups = [f"{x}down.weight" for x in ours], [f"{x}up.weight" for x in ours]
        if place.endswith("wqkv"):
            if len(ours) == 1:
                return {}
            q, k, v = ups
            keys[first] = Repeated(*downs)
            keys[second] = GroupedHeads(q, k, v, num_key_heads, head_dim)
        else:
            (keys[first],), (keys[second],) = downs, ups
    roots = [key.removesuffix(".weight") for key in keys]
    return {"xcomposer2": KeyTable(keys, roots)}
