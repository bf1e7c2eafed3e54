"""How fast are Q-Former, Idefics2's perceiver and MiniCPM-V's resampler, against library modules?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_connectors.py [--rounds 5]

Times are CPU milliseconds of this process, the best of some rounds in which both sides take turns:
trust their ratios (ours / library; below 1 we are faster). Values and gradients are held against
each other first. Widths, heads, queries and features are the published ones; layers and views are
fewer, as a whole model does not fit this machine's patience. The library of MiniCPM-V's formula is
torch's `nn.MultiheadAttention`, as its reference is built.
"""

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import vlm  # noqa: F401 (lets torchvision import beside a CPU torch)
from connectors import Connector, build_connector
from connectors.checkpoint_keys import to_published
from connectors.position_tables import sincos_2d

Run = Callable[[Tensor], Tensor]
VIEWS = 2


def qformer(layers: int) -> tuple[Connector, Run, nn.Module, Tensor]:
    """BLIP-2: 257 features of EVA-g, 32 queries, width 768. One feature is left out: a grid."""
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = {"type": "qformer", "num_layers": layers, "vision_norm": False, "dropout": 0.0}
    ours = build_connector(config, [1408], 2560)
    library = Blip2QFormerModel(
        Blip2QFormerConfig(
            num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    state = to_published(ours, "hf_blip2")
    library.load_state_dict(_under(state, "qformer."))
    projection = nn.Linear(768, 2560)
    projection.load_state_dict(_under(state, "language_projection."))

    def run(x: Tensor) -> Tensor:
        queries = state["query_tokens"].expand(len(x), -1, -1)
        seen = library(queries, encoder_hidden_states=x.flatten(1, 2)).last_hidden_state
        return projection(seen)

    return ours, run, nn.ModuleList([library, projection]), torch.randn(VIEWS, 16, 16, 1408)


def idefics2(layers: int) -> tuple[Connector, Run, nn.Module, Tensor]:
    """Idefics2: 64 latents, 16 heads of 96 channels; width 1024 for 4096, 576 features."""
    from transformers.models.idefics2.configuration_idefics2 import (
        Idefics2Config,
        Idefics2PerceiverConfig,
    )
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    ours = build_connector({"type": "idefics2_perceiver", "num_layers": layers}, [1152], 1024)
    config = Idefics2Config(
        vision_config={"hidden_size": 1152},
        text_config={"model_type": "mistral", "hidden_size": 1024, "intermediate_size": 3584},
        perceiver_config=Idefics2PerceiverConfig(hidden_size=1024, resampler_depth=layers),
    )
    library = Idefics2Connector(config)
    library.load_state_dict(_under(to_published(ours, "idefics2"), "connector."))

    def run(x: Tensor) -> Tensor:
        flat = x.flatten(1, 2)
        return library(flat, torch.ones(flat.shape[:2], dtype=torch.bool))

    return ours, run, library, torch.randn(VIEWS, 24, 24, 1152)


class MultiheadResampler(nn.Module):
    """MiniCPM-V 2.6's formula on `nn.MultiheadAttention`."""

    def __init__(self, state: Mapping[str, Tensor], heads: int) -> None:
        super().__init__()
        dim = state["query"].shape[1]
        self.query, self.proj = nn.Parameter(state["query"]), nn.Parameter(state["proj"])
        self.kv_proj = nn.Linear(state["kv_proj.weight"].shape[1], dim, bias=False)
        self.attn = nn.MultiheadAttention(dim, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.load_state_dict(dict(state))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (T, H, W, D) to tokens (T, Q, E)."""
        table = sincos_2d(x.shape[1], x.shape[2], self.query.shape[1]).flatten(0, 1)
        x = self.ln_kv(self.kv_proj(x.flatten(1, 2))).transpose(0, 1)
        query = self.ln_q(self.query)[:, None].expand(-1, x.shape[1], -1)
        mixed = self.attn(query, x + table[:, None], x, need_weights=False)[0]
        return self.ln_post(mixed.transpose(0, 1)) @ self.proj


def minicpm(layers: int) -> tuple[Connector, Run, nn.Module, Tensor]:
    """MiniCPM-V 2.0 and 2.6: 64 queries, SigLIP's width 1152, E 2304, 1024 features."""
    ours = build_connector({"type": "minicpm_resampler"}, [1152], 2304)
    state = _under(to_published(ours, "minicpm_v"), "resampler.")
    library = MultiheadResampler({k: v.clone() for k, v in state.items()}, 18)
    return ours, library, library, torch.randn(VIEWS, 32, 32, 1152)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def measure(run: Run, module: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return milliseconds of a forward, and of a forward with its backward."""
    module.zero_grad()
    begin = time.process_time()
    output = run(x)
    middle = time.process_time()
    output.square().mean().backward()
    return (middle - begin) * 1e3, (time.process_time() - begin) * 1e3


def compare(ours: Run, library: Run, x: Tensor) -> tuple[float, float]:
    """Return the largest differences of values and of gradients, relative to the largest number.

    Raises:
        AssertionError: the two sides do not compute the same.
    """
    pairs = []
    for run in (ours, library):
        given = x.clone().requires_grad_()
        output = run(given)
        output.square().mean().backward()
        assert given.grad is not None
        pairs.append((output.detach(), given.grad))
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pairs, strict=True)]
    assert max(differences) < 1e-4, differences
    return differences[0], differences[1]


def main() -> None:
    """Print one line per connector."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    names = {build.__name__: build for build in (qformer, idefics2, minicpm)}
    parser.add_argument("--only", choices=names, nargs="+", default=list(names))
    arguments = parser.parse_args()
    print("connector   forward ours/library ms  ratio | with backward ms  ratio | differences")
    for build in (names[name] for name in arguments.only):
        torch.manual_seed(0)
        connector, library, module, x = build(arguments.layers)
        values, gradients = compare(lambda x, c=connector: c([x]), library, x)
        best = [[float("inf")] * 2, [float("inf")] * 2]
        x.requires_grad_()
        for _ in range(arguments.rounds):
            sides = ((lambda x, c=connector: c([x]), connector), (library, module))
            for side, (run, owner) in enumerate(sides):
                times = measure(run, owner, x)
                best[side] = [min(old, new) for old, new in zip(best[side], times, strict=True)]
        (forward, both), (their_forward, their_both) = best
        print(
            f"{build.__name__:10} {forward:8.1f} /{their_forward:8.1f}  "
            f"{forward / their_forward:.2f} | {both:8.1f} /{their_both:8.1f}  "
            f"{both / their_both:.2f} | {values:.0e} {gradients:.0e}"
        )


if __name__ == "__main__":
    main()
