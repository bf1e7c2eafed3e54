"""Is this the same model as before? Fingerprints of weights and processor, taken from memory.

A path says nothing: a folder may hold another model after the next training run.
"""

import hashlib
import json
from typing import Any

import torch

WHOLE_TENSOR_BYTES = 1 << 30  # up to this size in all, every byte counts
SAMPLED_ELEMENTS = 4096  # beyond it, so many evenly spaced elements of every tensor


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Return a digest over names, shapes, types and values of all parameters and buffers.

    Models above 1 GiB are sampled: a change of one training step touches every tensor, so it is
    seen; a change of single hand-picked elements may not be.
    """
    state = model.state_dict()
    whole = sum(t.numel() * t.element_size() for t in state.values()) <= WHOLE_TENSOR_BYTES
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        if not whole and flat.numel() > SAMPLED_ELEMENTS:
            flat = flat[:: flat.numel() // SAMPLED_ELEMENTS]
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_processor(processor: Any) -> str:
    """Return a digest over what turns text and pictures into inputs.

    The vocabulary and its rules, the special tokens, the chat template, the picture settings. Not
    the saved files: they also say how they were loaded ("local_files_only").
    """
    parts = {
        **_tokenizer_parts(processor.tokenizer),
        "chat_template": processor.chat_template,
        "images": processor.image_processor.to_dict(),
    }
    if processor.reads_instructions:
        parts["instructions"] = _tokenizer_parts(processor.instruction_tokenizer)
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """Return the vocabulary with its rules, and the special tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return {"rules": rules, "special_tokens": special}
