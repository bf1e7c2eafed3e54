"""What do padding, sorting by length and packing cost? Fill and CPU time per 1000 tokens, one run.

    python tests/benchmarks/bench_packing.py

A Qwen2 of 4 layers of 256 learns 64 records in float32 on one thread, forward and backward, always
the same ones. Lengths are lognormal, as of pictures of several sizes with questions of several
lengths: mean 190, at most 640 tokens. Times are CPU seconds of this process, the least of REPEATS.
"""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import time

import numpy as np
import torch
from transformers import AutoModel, Qwen2Config

from train.order import like_lengths_together
from train.packing import best_fit
from vlm.packed_attention import packed_mask, use_packed_attention

RECORDS, MICRO_BATCH, MOST, ROW, REPEATS = 64, 8, 640, 2048, 2


def padded(model: torch.nn.Module, lengths: list[int]) -> torch.Tensor:
    """Run records as rows padded to the longest."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.ones(mask.shape, dtype=torch.long)
    hidden = model(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return hidden[mask].square().sum()


def packed(model: torch.nn.Module, lengths: list[int]) -> torch.Tensor:
    """Run records as documents of one row."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = packed_mask(model, positions, None)  # pyright: ignore[reportArgumentType]
    ids = torch.ones_like(positions)
    out = model(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    return out.last_hidden_state.square().sum()


def main() -> None:
    """Print one line of a table for each way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = use_packed_attention(
        AutoModel.from_config(
            Qwen2Config(
                vocab_size=1000,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    ).train()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.7, RECORDS), 20, MOST).astype(int)
    order = np.arange(RECORDS).reshape(-1, MICRO_BATCH).tolist()
    by_length = np.reshape(like_lengths_together(lengths.tolist(), MICRO_BATCH, rng), (-1, 8))
    filled = best_fit(lengths, ROW)
    ways = {
        "padded, 8 records": (padded, order, None),
        "padded, sorted within 8 micro-batches": (padded, by_length.tolist(), None),
        "packed, 8 records a row": (packed, order, None),
        f"packed, best fit to {ROW}": (packed, filled, ROW),
    }
    tokens = int(lengths.sum())
    print(f"{RECORDS} records, {tokens} tokens, mean {lengths.mean():.0f}")
    print("| rows | micro-batches | fill | CPU ms per 1000 tokens |\n|---|---|---|---|")
    for name, (run, batches, room) in ways.items():
        most = [room or len(b) * max(lengths[i] for i in b) for b in batches]
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            for batch in batches:
                run(model, [int(lengths[i]) for i in batch]).backward()
                model.zero_grad()
            times.append(time.process_time() - start)
        fill = tokens / sum(most) if run is padded or room else 1.0
        cost = min(times) / tokens * 1e6
        print(f"| {name} | {len(batches)} | {fill:.1%} | {cost:.0f} |", flush=True)


if __name__ == "__main__":
    main()
