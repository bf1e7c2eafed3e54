"""Which connectors are there, and how is one built from its config dict?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from connectors.base import Connector, ConnectorConfig
from connectors.cabstractor import CAbstractorConnector
from connectors.channel_concat import ChannelConcatConnector
from connectors.config import config_from_mapping
from connectors.errors import UserError
from connectors.fuyu import FuyuConnector
from connectors.idefics2_perceiver import Idefics2PerceiverConnector
from connectors.kan import KANConnector
from connectors.linear import LinearConnector
from connectors.minicpm_resampler import MiniCPMResamplerConnector
from connectors.minigemini import MiniGeminiConnector
from connectors.mlp import MLPConnector
from connectors.perceiver import PerceiverConnector
from connectors.pixel_shuffle import PixelShuffleConnector
from connectors.pooling import PoolingConnector
from connectors.qformer import QFormerConnector
from connectors.qwen2vl_merger import Qwen2VLMergerConnector
from connectors.qwen_vl import QwenVLConnector
from connectors.registry import lookup
from connectors.sva import SVAConnector

__all__ = [
    "CONNECTORS",
    "Connector",
    "ConnectorConfig",
    "build_connector",
    "connector_token_grid",
    "resolve_connector_config",
]

CONNECTORS: dict[str, type[Connector]] = {
    "cabstractor": CAbstractorConnector,
    "channel_concat": ChannelConcatConnector,
    "fuyu": FuyuConnector,
    "idefics2_perceiver": Idefics2PerceiverConnector,
    "kan": KANConnector,
    "linear": LinearConnector,
    "minicpm_resampler": MiniCPMResamplerConnector,
    "minigemini": MiniGeminiConnector,
    "mlp": MLPConnector,
    "perceiver": PerceiverConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "pooling": PoolingConnector,
    "qformer": QFormerConnector,
    "qwen2vl_merger": Qwen2VLMergerConnector,
    "qwen_vl": QwenVLConnector,
    "sva": SVAConnector,
}


def _parse(config: Mapping[str, Any]) -> tuple[type[Connector], ConnectorConfig]:
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


def build_connector(
    config: Mapping[str, Any], vision_dims: Sequence[int], text_dim: int
) -> Connector:
    """Build the connector of `config`, such as `{"type": "mlp", "depth": 2}`, with new weights.

    Args:
        config: the connector's type and fields.
        vision_dims: D of each feature map the vision encoder gives.
        text_dim: E, the width of the language model's embeddings.

    Raises:
        UserError: unknown type, unknown field, or a value of the wrong type.
    """
    connector_class, parsed = _parse(config)
    return connector_class(parsed, vision_dims, text_dim)


def connector_token_grid(config: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the tokens of one view with (height, width) features.

    Raises:
        UserError: the config is wrong, or the connector cannot take such a grid.
    """
    return _parse(config)[1].token_grid(height, width)


def resolve_connector_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with every default written out, as `config.json` keeps it.

    Raises:
        UserError: unknown type, unknown field, or a value of the wrong type.
    """
    parsed = _parse(config)[1]
    return {"type": config["type"], **asdict(parsed)}
