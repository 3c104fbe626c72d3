"""Trains one transcoder with dictionary_learning (PyPI: dictionary-learning), in that package's own environment.

    python train_dictionary_learning.py PAIRS.safetensors WIDTH K EPOCHS BATCH LR

In: pairs and sizes. The package trains autoencoders; the smallest change that makes its BatchTopK trainer learn pairs
is a loss against a separate target. Everything else is its own `update`. Out: one JSON line, as in train_sparsify.py.
"""

import json
import sys
import time

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from safetensors.torch import load_file

pairs, width, k, epochs, batch, lr = sys.argv[1], *map(int, sys.argv[2:6]), float(sys.argv[6])
data = {name: tensor.float() for name, tensor in load_file(pairs).items()}
d_model, scale = data["x"].shape[1], data["residual"].std()


class Transcoding(BatchTopKTrainer):
    """Rows are [x | target]."""

    def loss(self, rows, step=None, logging=False):
        x, target = rows.split(d_model, dim=1)
        acts, active, positive = self.ae.encode(x, return_active=True, use_threshold=False)
        if step > self.threshold_start_step:
            self.update_threshold(acts)
        error = target - self.ae.decode(acts)
        fired = torch.zeros_like(self.num_tokens_since_fired, dtype=torch.bool)
        fired[active] = True
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[fired] = 0
        auxiliary = self.get_auxiliary_loss(error.detach(), positive)
        return error.pow(2).sum(-1).mean() + self.auxk_alpha * auxiliary

    @staticmethod
    def geometric_median(rows):
        return torch.zeros(d_model)


rows = torch.cat([data["x"], data["residual"] / scale], dim=1)
steps = epochs * -(-len(rows) // batch)
trainer = Transcoding(
    steps=steps,
    activation_dim=d_model,
    dict_size=width,
    k=k,
    layer=0,
    lm_name="none",
    dict_class=BatchTopKSAE,
    lr=lr,
    warmup_steps=max(1, steps // 20),
    decay_start=steps * 2 // 3,
    threshold_start_step=steps // 4,
    seed=0,
    device="cpu",
)
order = torch.Generator().manual_seed(0)
started, tokens, step = 0.0, 0, 0
for _ in range(epochs):
    for chosen in torch.randperm(len(rows), generator=order).split(batch):
        trainer.update(step, rows[chosen])
        step += 1
        if started:
            tokens += len(chosen)
        started = started or time.perf_counter()
seconds = time.perf_counter() - started
with torch.no_grad():
    acts = trainer.ae.encode(data["held_x"], use_threshold=True)
    found = trainer.ae.decode(acts) * scale
left = (found - data["held_residual"]).pow(2).sum() / data["held_residual"].pow(2).sum()
l0 = (acts > 0).sum(1).float().mean().item()
print(json.dumps({"tokens_per_second": tokens / seconds, "unexplained": left.item(), "l0": l0}))
