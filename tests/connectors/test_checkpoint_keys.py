"""Do published connector weights arrive whole, or not at all?"""

import pytest
import torch

from connectors import build_connector
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
