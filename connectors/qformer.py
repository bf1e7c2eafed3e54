"""How does BLIP-2 make 32 tokens of any picture? A Q-Former, then a linear layer to E.

Shapes: T views, H W feature grid, D encoder width, Q queries, N = Q tokens per view, L text tokens,
C the Q-Former's width, E language-model width.

The second-stage form by default: queries alone. With `instruction: true` it is InstructBLIP's: a
text, such as the question, stands beside the queries, so that they read what is asked for; only the
queries go on to the language model.

Surprises:
- The Q-Former stays in float32 in a half-precision model; the last linear layer does not.
- The features are normed first (`ln_vision`), which LAVIS counts to the connector, with eps 1e-5.
  transformers counts it to the encoder, with eps 1e-6: for features that come normed from there,
  `vision_norm: false`.
- The text has the Q-Former's own vocabulary (BERT's), not the language model's: `tokenizer` names
  it, and a checkpoint keeps it in `qformer_tokenizer/`. vlm/instructions.py says which text it is.

Follows `lavis/models/blip2_models/blip2_opt.py`, `blip2_vicuna_instruct.py` of salesforce/LAVIS and
transformers' `modeling_blip_2.py`, `modeling_instructblip.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.key_table import KeyTable, Layout, Unsqueezed
from connectors.qformer_blocks import QFormer, QFormerSize
from connectors.qformer_keys import idle_keys, qformer_keys
from connectors.views import NOTHING_KNOWN, Reading, TextInput, TextSource, Views

LAVIS_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
# What of a checkpoint is the connector's, beside queries and projection: Q-Former, features' norm.
ROOTS = {"lavis": ("Qformer", "ln_vision"), "hf": ("qformer", "vision_model.post_layernorm")}


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(ConnectorConfig):
    """How many tokens a view gets, and the Q-Former's sizes; the defaults are BLIP-2's."""

    num_queries: int = 32
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feed_forward_dim: int = 3072
    cross_attention_every: int = 2  # layers 0, 2, 4, ... look at the features
    dropout: float = 0.1
    vision_norm: bool = True  # norm the features first
    vision_norm_eps: float = 1e-5
    instruction: bool = False  # InstructBLIP: `project` needs a text
    tokenizer: str | None = None  # of the text: folder or hub id of BERT's
    vocab_size: int = 30523  # of the text: BERT's 30522 and `[DEC]`
    max_num_positions: int = 512  # longest text

    def __post_init__(self) -> None:
        check_positive(
            "connector 'qformer'",
            num_queries=self.num_queries,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            feed_forward_dim=self.feed_forward_dim,
            cross_attention_every=self.cross_attention_every,
            vocab_size=self.vocab_size,
            max_num_positions=self.max_num_positions,
        )
        if self.hidden_dim % self.num_heads:
            raise UserError(
                f"connector 'qformer': num_heads {self.num_heads} does not divide hidden_dim "
                f"{self.hidden_dim}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, Q): the tokens are no picture."""
        return 1, self.num_queries

    def text_source(self) -> TextSource | None:
        """Return how the instructions are tokenised, with `instruction: true`."""
        if not self.instruction:
            return None
        return TextSource(self.tokenizer, self.vocab_size, self.max_num_positions)

    def size(self, vision_dim: int) -> QFormerSize:
        """Return the Q-Former's numbers for an encoder of width D."""
        return QFormerSize(
            vision_dim=vision_dim,
            num_queries=self.num_queries,
            hidden_dim=self.hidden_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            feed_forward_dim=self.feed_forward_dim,
            cross_attention_every=self.cross_attention_every,
            dropout=self.dropout,
            vision_norm_eps=self.vision_norm_eps if self.vision_norm else None,
            vocab_size=self.vocab_size if self.instruction else None,
            max_num_positions=self.max_num_positions,
        )


class QFormerConnector(Connector[QFormerConfig]):
    """A Q-Former and a linear layer."""

    config_class = QFormerConfig

    def __init__(self, config: QFormerConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.qformer = QFormer(config.size(sum(vision_dims)))
        self.projection = nn.Linear(config.hidden_dim, text_dim)

    @property
    def reads(self) -> frozenset[Reading]:
        """Return that texts are read, with `instruction: true`."""
        return frozenset({"text"} if self.config.instruction else ())

    def forward(self, features: Sequence[Tensor], views: Views = NOTHING_KNOWN) -> Tensor:
        """Same as `project`, with the views' texts."""
        return self.project(features, views.text)

    def project(self, features: Sequence[Tensor], text: TextInput | None = None) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, Q, E).

        Args:
            features: the encoder's maps.
            text: with `instruction: true`, ids and mask (T, L) of a text for each view, tokenised
                as BERT does; otherwise None.

        Raises:
            UserError: a text is missing, or there is one that nothing reads.
        """
        flat = join_channels(features, self.vision_dims).flatten(1, 2)
        return self.read(flat, text)

    def read(
        self, features: Tensor, text: TextInput | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map features (T, K, D) to tokens (T, Q, E); mask (T, K) is True where one is real."""
        if self.config.instruction != (text is not None):
            raise UserError(
                "connector 'qformer' with instruction: true needs a text for each view"
                if self.config.instruction
                else "connector 'qformer' reads no text; set instruction: true, or give it none"
            )
        queries = self.qformer(features, text, feature_mask=mask).queries
        return self.projection(queries.to(self.projection.weight.dtype))

    @classmethod
    def key_tables(cls, config: QFormerConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of transformers' ports and, with the features' norm, of LAVIS.

        In LAVIS the linear layer is called after the language model; the format is then
        "lavis_opt_proj", "lavis_t5_proj" or "lavis_llm_proj".
        """
        size = config.size(vision_dim=1)
        port = "hf_instructblip" if config.instruction else "hf_blip2"
        tables = {port: _table(size, "hf", "language_projection")}
        if config.vision_norm:
            tables |= {f"lavis_{p}": _table(size, "lavis", p) for p in LAVIS_PROJECTIONS}
        return tables


def _table(size: QFormerSize, style: Literal["lavis", "hf"], projection: str) -> KeyTable:
    """Return the whole connector's keys in one style."""
    keys: dict[str, str | Layout] = {
        theirs: f"qformer.{ours}" if isinstance(ours, str) else Unsqueezed("qformer.queries")
        for theirs, ours in qformer_keys(size, style).items()
    }
    keys |= {f"{projection}.{n}": f"projection.{n}" for n in ("weight", "bias")}
    roots = ["query_tokens", projection, *ROOTS[style]]
    if size.vision_norm_eps is None:
        roots.remove(ROOTS[style][-1])
    return KeyTable(keys, roots, idle_keys(size, style))
