"""What are SVA's weights called in Cambrian's checkpoints?"""

from collections.abc import Mapping, Sequence

from connectors.sva_blocks import Kind


def sampler_keys(
    theirs: str, ours: str, windows: Sequence[int], depth: int = 1, kind: Kind = "joint"
) -> dict[str, str]:
    """Return {published key: our key} of one `VisionTokenSampler`, our `Sampler`.

    Args:
        theirs: name of the published module and a dot, such as "vision_sampler_0.", or
            "vision_sampler_layers.0." for the first site inside the language model.
        ours: name of ours and a dot.
        windows: R of each map.
        depth: number of layers.
        kind: of the layers.
    """
    layer = _layer_keys(windows, kind)
    return {
        f"{theirs}layers.{n}.{theirs_key}": f"{ours}layers.{n}.{our_key}"
        for n in range(depth)
        for theirs_key, our_key in layer.items()
    }


def map_projector_keys(theirs: str, ours: str) -> dict[str, str]:
    """Return the keys of a `mm_projector_aux_i`: linear, GELU, linear, norm."""
    return {f"{theirs}{i}.{n}": f"{ours}{i}.{n}" for i in (0, 2, 3) for n in ("weight", "bias")}


def _layer_keys(windows: Sequence[int], kind: Kind) -> dict[str, str]:
    """Return {published key: our key} inside one layer."""
    keys = {
        "proj_context.weight": "project_context.weight",
        "proj_in.weight": "project_in.weight",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        **_mlp_keys("proj_out.", "project_out."),
    }
    for i, side in enumerate(windows):
        if side > 1:
            keys[f"pos_embed_{i}"] = f"positions.{i}.table"
    if kind == "joint":
        maps = {f"_{i}": i for i in range(len(windows))}
        return {**keys, **_attention_keys("cross_attn.", "attention.", maps)}
    keys |= _mlp_keys("weight_mlp.", "weigh.")
    for i, side in enumerate(windows):
        theirs, ours = f"aggregate_{i}.attention_layer.", f"readers.{i}."
        keys |= _mlp_keys(theirs, ours) if side == 1 else _attention_keys(theirs, ours, {"": 0})
    return keys


def _mlp_keys(theirs: str, ours: str) -> dict[str, str]:
    """Return the keys of a `SamplerMLP`."""
    return {f"{theirs}{n}.weight": f"{ours}{n}.weight" for n in ("linear_1", "linear_2")}


def _attention_keys(theirs: str, ours: str, maps: Mapping[str, int]) -> dict[str, str]:
    """Return the keys of an attention; `maps` is {suffix of `k_proj`: number of the map}."""
    modules = {"q_proj": "query"}
    for suffix, i in maps.items():
        modules |= {f"k_proj{suffix}": f"keys.{i}", f"v_proj{suffix}": f"values.{i}"}
    parts = ("0.weight", "0.bias", "1.weight")
    keys = {f"{theirs}{t}.{p}": f"{ours}{o}.{p}" for t, o in modules.items() for p in parts}
    return {**keys, f"{theirs}o_proj.weight": f"{ours}output.weight"}
