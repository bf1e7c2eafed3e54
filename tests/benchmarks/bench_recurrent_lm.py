"""How much faster do Mamba-1 language models train on our scan than on transformers' loop?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_recurrent_lm.py [--lengths 64 128 256]

CPU milliseconds of this process on one thread, both sides in turn in one process, the best of the
runs: trust the ratios. Both sides have the same weights, and their numbers are compared. The last
column is one token from a cache, which is transformers' own code on both sides.
"""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import argparse
import copy
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from vlm.mamba_scan import use_scan

MAMBA = {"state_size": 16}
JAMBA = {"mamba_d_state": 16, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
JAMBA |= {"num_experts_per_tok": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
JAMBA |= {"intermediate_size": 512}
KINDS = {"mamba": MAMBA, "falcon_mamba": MAMBA, "jamba": JAMBA}


def cpu_ms(function: Callable[[], object], runs: int) -> float:
    """Return the least CPU time of some calls, in milliseconds."""
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best * 1000


def language_model(kind: str, dim: int, layers: int) -> PreTrainedModel:
    """Return a random bare language model."""
    torch.manual_seed(0)
    names = {"vocab_size": 32, "hidden_size": dim, "num_hidden_layers": layers}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoModel.from_config(AutoConfig.for_model(kind, **names, **tokens, **KINDS[kind]))


def train(model: PreTrainedModel, x: torch.Tensor) -> torch.Tensor:
    """Run forward and backward; return the gradient of the first projection."""
    model.train().zero_grad()
    model(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean().backward()
    weight = next(p for n, p in model.named_parameters() if n.endswith("in_proj.weight"))
    assert weight.grad is not None
    return weight.grad


@torch.no_grad()
def forward(model: PreTrainedModel, x: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states."""
    return model.eval()(inputs_embeds=x, use_cache=False).last_hidden_state


@torch.no_grad()
def one_token_ms(model: PreTrainedModel, x: torch.Tensor, runs: int) -> float:
    """Return the time of one token after a prompt."""
    cache = DynamicCache(config=model.config)
    name = "past_key_values" if model.config.model_type == "jamba" else "cache_params"
    options = {name: cache, "use_cache": True}
    model.eval()(inputs_embeds=x, **options)
    return cpu_ms(lambda: model(inputs_embeds=x[:, :1], **options), runs)


def main() -> None:
    """Print a line for each kind and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':>13} {'L':>5}  forward ms: theirs, ours     both ways: theirs, ours    token")
    for kind in args.kinds:
        theirs = language_model(kind, args.dim, args.layers)
        ours = use_scan(copy.deepcopy(theirs))
        for length in args.lengths:
            x = torch.randn(args.batch, length, args.dim)
            torch.testing.assert_close(forward(ours, x), forward(theirs, x), rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(train(ours, x), train(theirs, x), rtol=1e-4, atol=1e-4)
            times = [
                cpu_ms(lambda f=f, model=model, x=x: f(model, x), args.runs)
                for f in (forward, train)
                for model in (theirs, ours)
            ]
            token = one_token_ms(ours, x, args.runs)
            pairs = ((times[0], times[1]), (times[2], times[3]))
            columns = "  ".join(f"{a:9.1f} {b:8.1f} {a / b:6.1f}x" for a, b in pairs)
            print(f"{kind:>13} {length:>5}  {columns}  {token:6.1f}", flush=True)


if __name__ == "__main__":
    main()
