"""How is one published weight laid out against ours, where a new name alone is not enough?

A key table maps each published key to a string, our name of the same tensor, or to a `Layout`,
which cuts the published tensor into ours and joins ours again. Both directions are exact.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, cat

from connectors.errors import UserError


class Layout(Protocol):
    """One published tensor against one or more of ours."""

    names: tuple[str, ...]  # our keys, in the order of `split` and `join`

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Return our tensors, one per name."""
        ...

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Return the published tensor."""
        ...


class Stacked:
    """Our tensors stand one under another along dim 0 of the published one.

    Equal parts, or `sizes` rows each, as `in_proj_weight` of `nn.MultiheadAttention`: q, k, v.
    """

    def __init__(self, *names: str, sizes: Sequence[int] | None = None) -> None:
        self.names = names
        self.sizes = sizes

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Cut (n * R, ...) into n tensors (R, ...), or into those of `sizes` rows."""
        sizes = self.sizes or [theirs.shape[0] // len(self.names)] * len(self.names)
        return [part.contiguous() for part in theirs.split(list(sizes))]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Stack them again."""
        return cat(list(ours))


class Transposed:
    """The published matrix multiplies from the right (`x @ w`); ours is a linear layer's weight."""

    def __init__(self, name: str) -> None:
        self.names = (name,)

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Transpose (in, out) to (out, in)."""
        return [theirs.T.contiguous()]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Transpose (out, in) to (in, out)."""
        return ours[0].T.contiguous()


class Unsqueezed:
    """The published tensor has a leading dimension of one more than ours."""

    def __init__(self, name: str) -> None:
        self.names = (name,)

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Drop the first dimension."""
        return [theirs[0]]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Add the first dimension."""
        return ours[0][None]


class GroupedHeads:
    """Rows of queries, keys and values stand head group by head group, as in InternLM2's `wqkv`.

    Each group is that of one head of the keys: its heads of the queries, its keys, its values.
    Ours are queries, keys and values, each with its heads in order.
    """

    def __init__(self, query: str, key: str, value: str, num_key_heads: int, head_dim: int) -> None:
        self.names = (query, key, value)
        self.num_key_heads = num_key_heads
        self.head_dim = head_dim

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Cut (G * (n + 2) * P, ...) of G groups into (G * n * P, ...) and two of (G * P, ...)."""
        groups = theirs.unflatten(0, (self.num_key_heads, -1, self.head_dim))
        parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
        return [part.flatten(0, 2).contiguous() for part in parts]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Put the rows in groups again."""
        parts = [part.unflatten(0, (self.num_key_heads, -1, self.head_dim)) for part in ours]
        return cat(parts, dim=1).flatten(0, 2)


class Repeated:
    """The published tensor is several of ours, which do not differ: what they do is shared there.

    Once ours were trained apart from each other there is no way back; `join` refuses.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Give each its copy."""
        return [theirs.clone() for _ in self.names]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Return the one tensor.

        Raises:
            UserError: ours differ.
        """
        for name, tensor in zip(self.names, ours, strict=True):
            if not tensor.equal(ours[0]):
                raise UserError(
                    f"{name} differs from {self.names[0]}, but the published format has one weight "
                    "for both; weights trained apart cannot be written in it"
                )
        return ours[0]


class KeyTable(dict[str, "str | Layout"]):
    """A key table that says which names of a checkpoint are the connector's.

    Args:
        keys: published key -> our key, or a layout.
        roots: the dotted names under which every key is the connector's, so that one left over is
            noticed; by default what all keys begin with.
        ignored: published keys under a root that hold nothing to load, such as position ids.
    """

    def __init__(
        self,
        keys: Mapping[str, "str | Layout"],
        roots: Iterable[str] = (),
        ignored: Iterable[str] = (),
    ) -> None:
        super().__init__(keys)
        self.roots = tuple(roots)
        self.ignored = frozenset(ignored)


def our_names(table: Mapping[str, "str | Layout"]) -> list[str]:
    """Return our keys, in the table's order; one that stands twice is there twice."""
    return [
        name
        for ours in table.values()
        for name in ((ours,) if isinstance(ours, str) else ours.names)
    ]
