"""Which connectors are there, and how is one built from its config dict?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from connectors.base import Connector, ConnectorConfig
from connectors.cabstractor import CAbstractorConnector
from connectors.chain import ChainConfig, ConnectorChain, Part
from connectors.channel_concat import ChannelConcatConnector
from connectors.cogvlm_glu import CogVLMGLUConnector
from connectors.config import check_value, config_from_mapping
from connectors.deepstack import DeepStackConnector
from connectors.errors import UserError
from connectors.fusion import HostShape
from connectors.fuyu import FuyuConnector
from connectors.gated_cross_attention import GatedCrossAttentionConnector
from connectors.high_resolution_cross_attention import HighResolutionConnector
from connectors.idefics2_perceiver import Idefics2PerceiverConnector
from connectors.kan import KANConnector
from connectors.linear import LinearConnector
from connectors.minicpm_resampler import MiniCPMResamplerConnector
from connectors.minigemini import MiniGeminiConnector
from connectors.mlp import MLPConnector
from connectors.partial_lora import PartialLoraConnector
from connectors.perceiver import PerceiverConnector
from connectors.pixel_shuffle import PixelShuffleConnector
from connectors.pooling import PoolingConnector
from connectors.qformer import QFormerConnector
from connectors.qwen2vl_merger import Qwen2VLMergerConnector
from connectors.qwen_vl import QwenVLConnector
from connectors.registry import lookup
from connectors.sva import SVAConnector
from connectors.sva_in_llm import SVAInLLMConnector
from connectors.views import TextSource
from connectors.visual_expert import VisualExpertConnector

__all__ = [
    "CONNECTORS",
    "Connector",
    "ConnectorChain",
    "ConnectorChoice",
    "ConnectorConfig",
    "acts_inside",
    "build_connector",
    "connector_token_grid",
    "replaces_linears",
    "resolve_connector_config",
    "stands_beside_linears",
    "text_source",
    "view_token_grid",
]

# One connector, {"type": ..., fields}, or a list of them.
ConnectorChoice = Mapping[str, Any] | Sequence[Mapping[str, Any]]

CONNECTORS: dict[str, type[Connector]] = {
    "cabstractor": CAbstractorConnector,
    "channel_concat": ChannelConcatConnector,
    "cogvlm_glu": CogVLMGLUConnector,
    "deepstack": DeepStackConnector,
    "fuyu": FuyuConnector,
    "gated_cross_attention": GatedCrossAttentionConnector,
    "high_resolution_cross_attention": HighResolutionConnector,
    "idefics2_perceiver": Idefics2PerceiverConnector,
    "kan": KANConnector,
    "linear": LinearConnector,
    "minicpm_resampler": MiniCPMResamplerConnector,
    "minigemini": MiniGeminiConnector,
    "mlp": MLPConnector,
    "partial_lora": PartialLoraConnector,
    "perceiver": PerceiverConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "pooling": PoolingConnector,
    "qformer": QFormerConnector,
    "qwen2vl_merger": Qwen2VLMergerConnector,
    "qwen_vl": QwenVLConnector,
    "sva": SVAConnector,
    "sva_in_llm": SVAInLLMConnector,
    "visual_expert": VisualExpertConnector,
}


def _parse(config: Any) -> tuple[type[Connector], ConnectorConfig]:
    """Return the connector class that `config["type"]` names, and its checked config."""
    if not isinstance(config, Mapping) or not isinstance(config.get("type"), str):
        raise UserError(
            f"connector must be a mapping with a 'type', such as {{type: mlp}}, not {config!r}; "
            f"choose a type from {', '.join(sorted(CONNECTORS))}"
        )
    values = dict(config)
    name = values.pop("type")
    connector_class = lookup("connector", name, CONNECTORS, group="vlm.connectors")
    where = f"connector {name!r}"
    return connector_class, config_from_mapping(connector_class.config_class, values, where)


def _parse_list(configs: Sequence[Any]) -> ChainConfig:
    """Return the checked parts of a list of connectors."""
    parts = []
    for config in configs:
        values: Any = config
        features = None
        if isinstance(config, Mapping):
            values = dict(config)
            features = values.pop("features", None)
        connector_class, parsed = _parse(values)
        name = values["type"]
        if features is not None:
            where = f"connector {name!r}: field 'features'"
            features = check_value(features, tuple[int, ...], where) or None
        parts.append(Part(name, connector_class, parsed, features))
    return ChainConfig(parts=tuple(parts))


def _parse_any(config: Any) -> tuple[type[Connector], ConnectorConfig]:
    """Return class and config of one connector, or of a chain of them."""
    if isinstance(config, Sequence) and not isinstance(config, str):
        return ConnectorChain, _parse_list(config)
    if isinstance(config, Mapping) and "features" in config:
        return ConnectorChain, _parse_list([config])
    connector_class, parsed = _parse(config)
    if connector_class.faces <= {"project"}:
        return connector_class, parsed
    return ConnectorChain, _parse_list([config])


def acts_inside(config: ConnectorChoice) -> bool:
    """Return whether a connector acts inside the language model too, so that it has to be known."""
    return any(part.faces - {"project"} for part in _inside_classes(config))


def stands_beside_linears(config: ConnectorChoice) -> bool:
    """Return whether a connector does something at the language model's linear layers."""
    return any("on_linear" in part.faces for part in _inside_classes(config))


def replaces_linears(config: ConnectorChoice) -> bool:
    """Return whether a connector stands for the language model's linear layers at some tokens."""
    return any(part.replaces_linear for part in _inside_classes(config))


def _inside_classes(config: ConnectorChoice) -> list[type[Connector]]:
    """Return the classes of a chain's parts; of a single connector that only projects, none."""
    parsed = _parse_any(config)[1]
    parts = parsed.parts if isinstance(parsed, ChainConfig) else ()
    return [part.connector_class for part in parts]


def build_connector(
    config: ConnectorChoice,
    vision_dims: Sequence[int],
    text_dim: int,
    host: HostShape | None = None,
) -> Connector:
    """Build the connector of `config`, such as `{"type": "mlp", "depth": 2}`, with new weights.

    Args:
        config: the connector's type and fields, or a list of them (connectors/chain.py).
        vision_dims: D of each feature map the vision encoder gives.
        text_dim: E, the width of the language model's embeddings.
        host: the language model's numbers, where `acts_inside`.

    Raises:
        UserError: unknown type, unknown field, or a value of the wrong type.
    """
    connector_class, parsed = _parse_any(config)
    if isinstance(parsed, ChainConfig):
        return ConnectorChain(parsed, vision_dims, text_dim, host)
    return connector_class(parsed, vision_dims, text_dim)


def connector_token_grid(config: ConnectorChoice, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the tokens of one view with (height, width) features.

    Raises:
        UserError: the config is wrong, or the connector cannot take such a grid.
    """
    parsed = _parse_any(config)[1]
    parts = parsed.parts if isinstance(parsed, ChainConfig) else ()
    count = 1 + max((max(part.features) for part in parts if part.features), default=0)
    return view_token_grid(config, [(height, width)] * count)


def view_token_grid(config: ConnectorChoice, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return (rows, columns) of the tokens of one view whose feature maps have these grids.

    Raises:
        UserError: the config is wrong, or the connector cannot take such a grid.
    """
    parsed = _parse_any(config)[1]
    if isinstance(parsed, ChainConfig):
        return parsed.view_token_grid(grids)
    return parsed.token_grid(*grids[0])


def text_source(config: ConnectorChoice) -> TextSource | None:
    """Return how the text is made that the connector reads beside features; None: it does not."""
    return _parse_any(config)[1].text_source()


def resolve_connector_config(config: ConnectorChoice) -> dict[str, Any] | list[dict[str, Any]]:
    """Return `config` with every default written out, as `config.json` keeps it.

    Raises:
        UserError: unknown type, unknown field, or a value of the wrong type.
    """
    parsed = _parse_any(config)[1]
    if not isinstance(parsed, ChainConfig):
        assert isinstance(config, Mapping), config
        return {"type": config["type"], **asdict(parsed)}
    written = [
        {"type": part.name, **asdict(part.config)}
        | ({} if part.features is None else {"features": list(part.features)})
        for part in parsed.parts
    ]
    return written[0] if isinstance(config, Mapping) else written
