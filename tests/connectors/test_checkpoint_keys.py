"""Do published connector weights arrive whole, or not at all?"""

import pytest
import torch

from connectors import Connector, ConnectorConfig, build_connector
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError


def make(**config):
    torch.manual_seed(0)
    return build_connector(config, [6], 8)


def test_prefixes_and_other_weights_do_not_matter():
    connector = make(type="mlp")
    state = {f"base_model.model.{k}": v for k, v in to_published(connector, "llava").items()}
    state["lm_head.weight"] = torch.zeros(3)
    state["not_mm_projector.0.weight"] = torch.zeros(3)
    found = from_published(connector, state)
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in connector.state_dict().items()
    }


def test_both_names_of_llava_are_known():
    connector = make(type="mlp")
    assert set(to_published(connector, "hf_llava")) == {
        f"multi_modal_projector.linear_{i}.{n}" for i in (1, 2) for n in ("weight", "bias")
    }
    found = from_published(connector, to_published(connector, "hf_llava"))
    assert torch.equal(found["layers.2.weight"], connector.layers[2].weight)


@pytest.mark.parametrize(("given", "wanted"), [(3, 2), (2, 3), (1, 2)])
def test_another_depth_is_refused_not_half_loaded(given, wanted):
    state = to_published(make(type="mlp", depth=given), "llava")
    with pytest.raises(UserError, match=r"mm_projector\.\d\.bias"):
        from_published(make(type="mlp", depth=wanted), state)


def test_another_width_is_refused_with_both_shapes():
    state = to_published(build_connector({"type": "mlp"}, [5], 8), "llava")
    with pytest.raises(UserError, match=r"\(8, 5\).*\(8, 6\)"):
        from_published(make(type="mlp"), state)


def test_a_checkpoint_without_a_connector_is_refused():
    with pytest.raises(UserError, match=r"looks for keys under mlp1\., multi_modal_projector\."):
        from_published(make(type="pixel_shuffle"), {"lm_head.weight": torch.zeros(1)})


def test_unknown_format_names_the_known_ones():
    with pytest.raises(UserError, match=r"unknown checkpoint format.*'lava'.*hf_llava, llava"):
        to_published(make(type="mlp"), "lava")


def test_old_token_order_has_no_port():
    connector = make(type="pixel_shuffle", version="v1")
    assert set(type(connector).key_tables(connector.config)) == {"internvl"}


class _Scattered(Connector[ConnectorConfig]):
    """Its published weights lie in two modules and a bare parameter, as Cambrian's do."""

    def __init__(self):
        super().__init__(ConnectorConfig(), [2], 2)
        self.query = torch.nn.Parameter(torch.randn(2))
        self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    @classmethod
    def key_tables(cls, config):
        names = ("weight", "bias")
        table = {f"aux_0.{n}": f"first.{n}" for n in names}
        table |= {**{f"proj.{n}": f"last.{n}" for n in names}, "query": "query"}
        return {"them": table}


def test_weights_of_several_modules_are_found_among_others():
    connector = _Scattered()
    state = {f"base.model.{k}": v for k, v in to_published(connector, "them").items()}
    others = ("query.bias", "my_query", "model.queries", "aux_1.weight", "vision.projection.weight")
    found = from_published(connector, {**state, **{key: torch.zeros(3) for key in others}})
    assert set(found) == set(connector.state_dict())
    assert all(torch.equal(found[key], value) for key, value in connector.state_dict().items())


def test_left_over_weights_of_several_modules_are_named():
    connector = _Scattered()
    state = {**to_published(connector, "them"), "model.aux_0.2.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"aux_0\.2\.weight stand only"):
        from_published(connector, state)
    with pytest.raises(UserError, match=r"keys under aux_0\., proj\., query$"):
        from_published(connector, {"lm_head.weight": torch.zeros(1)})
