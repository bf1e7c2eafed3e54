"""What are a Q-Former's weights called in LAVIS, in transformers and in BERT?

All three name one layer alike, apart from the attentions' query, key and value and from the prefix.
Names on our side are those of `QFormer`, without what it is held as.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from connectors.checkpoint_keys import find_keys, translate
from connectors.errors import UserError
from connectors.key_table import KeyTable, Layout, Unsqueezed
from connectors.qformer_blocks import QFormer, QFormerSize

Keys = dict[str, str | Layout]
FEED_FORWARD = {
    "up": "intermediate{}.dense",
    "down": "output{}.dense",
    "norm": "output{}.LayerNorm",
}
NAMES = ("weight", "bias")


def qformer_keys(size: QFormerSize, style: Literal["lavis", "hf"]) -> Keys:
    """Return {published key: our key} of a whole Q-Former, its queries and its features' norm."""
    root = {"lavis": "Qformer.bert", "hf": "qformer"}[style]
    keys: Keys = {"query_tokens": Unsqueezed("queries")}
    has_text = size.vocab_size is not None
    if size.vision_norm_eps is not None:
        norm = {"lavis": "ln_vision", "hf": "vision_model.post_layernorm"}[style]
        keys |= {f"{norm}.{n}": f"vision_norm.{n}" for n in NAMES}
    norm = {
        "lavis": "embeddings.LayerNorm",
        "hf": "embeddings.layernorm" if has_text else "layernorm",
    }
    keys |= {f"{root}.{norm[style]}.{n}": f"norm.{n}" for n in NAMES}
    if has_text:
        for table in ("word_embeddings", "position_embeddings"):
            keys[f"{root}.embeddings.{table}.weight"] = f"{table}.weight"
    for i in range(size.num_layers):
        layer = _attention("attention", "attention", style)
        layer |= _feed_forward("query_feed_forward", "_query")
        if i % size.cross_attention_every == 0:
            layer |= _attention("crossattention", "cross_attention", style)
        if has_text and (i < size.num_layers - 1 or size.text_output):
            layer |= _feed_forward("text_feed_forward", "")
        keys |= _in_layer(f"{root}.encoder.layer.{i}", i, layer)
    return keys


def idle_keys(size: QFormerSize, style: Literal["lavis", "hf"]) -> list[str]:
    """Return published keys that hold nothing to load: what never reaches the output."""
    if style == "lavis":
        idle, root = ["Qformer.bert.embeddings.position_ids"], "Qformer.bert"
    else:
        idle, root = ["qformer.embeddings.position_ids"], "qformer"
    if size.vocab_size is not None and not size.text_output:
        prefix = f"{root}.encoder.layer.{size.num_layers - 1}"
        idle += _in_layer(prefix, 0, _feed_forward("text_feed_forward", ""))
    return idle


def bert_keys(size: QFormerSize, *, old_names: bool = False) -> KeyTable:
    """Return {BERT's key: our key}: what BERT has of a Q-Former.

    Its feed-forward layers become the text's, or the queries' in a layer that has none for text.
    BERT has no queries and no look at features, and its token types are left out.

    Args:
        size: the Q-Former's.
        old_names: norms are `gamma` and `beta`, as in the file of bert-base-uncased.
    """
    keys: Keys = {f"embeddings.LayerNorm.{n}": f"norm.{n}" for n in NAMES}
    if size.vocab_size is not None:
        for table in ("word_embeddings", "position_embeddings"):
            keys[f"embeddings.{table}.weight"] = f"{table}.weight"
    for i in range(size.num_layers):
        last = i == size.num_layers - 1
        takes_text = size.vocab_size is not None and (not last or size.text_output)
        feed_forward = "text_feed_forward" if takes_text else "query_feed_forward"
        layer = _attention("attention", "attention", "lavis") | _feed_forward(feed_forward, "")
        keys |= _in_layer(f"encoder.layer.{i}", i, layer)
    if old_names:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            keys = {key.replace(new, name): ours for key, ours in keys.items()}
    return KeyTable(keys, ("embeddings", "encoder.layer"))


@torch.no_grad()
def start_from_bert(qformer: QFormer, state: Mapping[str, Tensor]) -> list[str]:
    """Set the weights that a BERT checkpoint has; as in LAVIS, queries' feed-forward too.

    Where the Q-Former has more words than BERT (LAVIS adds `[DEC]`), the further rows stay as new.

    Returns:
        The names of the weights that stay as they were, sorted.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    tables = [bert_keys(qformer.size, old_names=old) for old in (True, False)]
    found = [{k: v for k, v in find_keys(table, state).items() if k in table} for table in tables]
    table, keys = max(zip(tables, found, strict=True), key=lambda pair: len(pair[1]))
    if missing := sorted(set(table) - set(keys)):
        raise UserError(
            f"the checkpoint is no BERT of {qformer.size.num_layers} layers to start a Q-Former "
            f"from: it lacks {', '.join(missing[:4])}"
        )
    given = translate(table, {theirs: state[key] for theirs, key in keys.items()})
    for name in list(given):
        given.setdefault(name.replace("text_feed_forward", "query_feed_forward"), given[name])
    own = qformer.state_dict()
    for name, tensor in given.items():
        rows = len(tensor) if name == "word_embeddings.weight" else len(own[name])
        target = own[name][:rows]
        if target.shape != tensor.shape:
            raise UserError(
                f"BERT's weight for {name!r} has shape {tuple(tensor.shape)}, but the Q-Former "
                f"needs {tuple(own[name].shape)}; choose the BERT of its width"
            )
        target.copy_(tensor)
    return sorted(set(own) - set(given))


def _attention(theirs: str, ours: str, style: Literal["lavis", "hf"]) -> dict[str, str]:
    """Return {published module: our module} of one attention."""
    inner = {"lavis": "self", "hf": "attention"}[style]
    return {
        f"{theirs}.{inner}.query": f"{ours}.to_q",
        f"{theirs}.{inner}.key": f"{ours}.to_k",
        f"{theirs}.{inner}.value": f"{ours}.to_v",
        f"{theirs}.output.dense": f"{ours}.to_out",
        f"{theirs}.output.LayerNorm": f"{ours}.norm",
    }


def _feed_forward(ours: str, suffix: str) -> dict[str, str]:
    """Return {published module: our module} of one feed-forward layer."""
    return {theirs.format(suffix): f"{ours}.{part}" for part, theirs in FEED_FORWARD.items()}


def _in_layer(root: str, index: int, modules: Mapping[str, str]) -> Keys:
    """Return {published key: our key} of modules of layer `index`."""
    return {
        f"{root}.{theirs}.{n}": f"layers.{index}.{ours}.{n}"
        for theirs, ours in modules.items()
        for n in NAMES
    }
