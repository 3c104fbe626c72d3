"""Trains one transcoder with sparsify (PyPI: eai-sparsify), in that package's own environment.

    python train_sparsify.py PAIRS.safetensors WIDTH K EPOCHS BATCH LR

In: pairs and sizes. The package's `Trainer` is tied to a language model, so its `SparseCoder` is trained the way that
trainer does: the FVU it returns, Adam, gradients clipped to 1. Out: one JSON line with tokens per second, the
fraction of the target's energy left on validation rows, and L0.
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

pairs, width, k, epochs, batch, lr = sys.argv[1], *map(int, sys.argv[2:6]), float(sys.argv[6])
data = {name: tensor.float() for name, tensor in load_file(pairs).items()}
scale = data["residual"].std()
torch.manual_seed(0)
coder = SparseCoder(
    data["x"].shape[1], SparseCoderConfig(num_latents=width, k=k, transcode=True, normalize_decoder=False)
)
optimiser = torch.optim.Adam(coder.parameters(), lr=lr)
order = torch.Generator().manual_seed(0)
started, tokens = 0.0, 0
for _ in range(epochs):
    for chosen in torch.randperm(len(data["x"]), generator=order).split(batch):
        coder(data["x"][chosen], data["residual"][chosen] / scale).fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if started:
            tokens += len(chosen)
        started = started or time.perf_counter()
seconds = time.perf_counter() - started
with torch.no_grad():
    found = coder(data["held_x"], data["held_residual"] / scale).sae_out * scale
left = (found - data["held_residual"]).pow(2).sum() / data["held_residual"].pow(2).sum()
print(json.dumps({"tokens_per_second": tokens / seconds, "unexplained": left.item(), "l0": float(k)}))
