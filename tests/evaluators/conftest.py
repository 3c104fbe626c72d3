"""A second implementation of the splice, on a plain transformers model with plain hooks, one row at a time, no cache.

In: a model, patches and a combination. Out: logits, activation sums and greedy outputs to hold the fast one against.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from data.encoding import encode_row
from data.rows import Row
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import Passes
from models.blocks import read_paths
from models.transcoder import with_bos
from sites import Site, mlp_sites

CALL = "<tool_call>calculator({})</tool_call>"
ROWS = [
    Row("What is 12 + 30?", CALL.format("12 + 30"), "tool"),
    Row("Seven", "Seven", "copy"),
    Row("A context sentence that makes this prompt much longer than the window: 8 times 7, please?", "no", "tool_ood"),
    Row("On page 44 of 1987.", "On page 44 of 1987.", "copy"),
]
"""One prompt is longer than the tiny Gemma-2's sliding window of 64 tokens, one is a few bytes."""

SETS = {"one": ((1,), ()), "one, at BOS too": ((1,), (1,)), "several, one at BOS": ((0, 2), (2,))}
"""Layers, and those whose delta has a feature at BOS."""

CALCULATOR = {
    "tool_call": "calculator",
    "valid_tool_format": {"calculator": "closed"},
    "math_correct": {"calculator": "correct"},
    "copy_exact": {"equals_target": True, "on": ["copy"]},
}
"""The behaviours of the presets."""

COMBINE = {
    "no_delta": lambda y, base, delta, alpha: base,
    "full": lambda y, base, delta, alpha: base + delta,
    "alpha": lambda y, base, delta, alpha: base + alpha * delta,
    "error_term": lambda y, base, delta, alpha: base + (y - base),
    "true_output": lambda y, base, delta, alpha: y,
    "zero_ablation": lambda y, base, delta, alpha: 0 * y,
}

NORM = {"gemma2": "pre_feedforward_layernorm"}
"""The norm before the MLP, where it has another name than in Llama and Qwen."""
WRITES = {"gemma2": "post_feedforward_layernorm"}
"""What gives the MLP's output as it is added, where that is not the MLP itself."""


class ByHand:
    """The plain model, edited at `patches`; what `evaluators` computes, computed the slow way."""

    def __init__(self, model, patches, condition, alpha=1.0):
        self.model, self.patches, self.condition, self.alpha = model, patches, condition, alpha

    @staticmethod
    def activations(transcoder, x):
        pre = x @ transcoder.W_enc + transcoder.b_enc
        return torch.where((pre > 0) & (pre > transcoder.threshold), pre, torch.zeros_like(pre))

    def run(self, ids):
        """(logits (position, vocabulary), sum of base activations, of delta activations) of one row."""
        sums = SimpleNamespace(base=0.0, delta=0.0)
        with ExitStack() as stack:
            if self.condition != "raw":
                for patch in self.patches:
                    for handle in self._hooks(patch, sums):
                        stack.callback(handle.remove)
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits, sums.base, sums.delta

    def _hooks(self, patch, sums):
        kind, block = self.model.config.model_type, self.model.model.layers[patch.site.layer]
        seen = {}

        def read(module, args):
            seen["middle"] = args[0]

        def write(module, args, y):
            middle = seen["middle"][0, 1:]
            x = middle / (middle.pow(2).mean(-1, keepdim=True) + self.model.config.rms_norm_eps).sqrt()
            return self.edited(patch, x, y[0], sums).unsqueeze(0)

        yield getattr(block, NORM.get(kind, "post_attention_layernorm")).register_forward_pre_hook(read)
        yield getattr(block, WRITES.get(kind, "mlp")).register_forward_hook(write)

    def edited(self, patch, x, y, sums):
        """What takes the place of y; x is read at every position but BOS."""
        base_acts = self.activations(patch.base, x)
        base, delta = base_acts @ patch.base.W_dec + patch.base.b_dec, torch.zeros_like(x)
        sums.base += base_acts.sum().item()
        if patch.delta is not None and self.condition in ("full", "alpha"):
            delta_acts = self.activations(patch.delta, x)
            delta = delta_acts @ patch.delta.W_dec
            sums.delta += delta_acts.sum().item()
        return torch.cat([y[:1], COMBINE[self.condition](y[1:], base, delta, self.alpha)])

    def nll(self, encoded):
        """Summed cross-entropy of the target in nats, and the argmax at each target token."""
        logits, *_ = self.run(encoded.ids)
        first = len(encoded.prompt)
        steps = logits[first - 1 : len(encoded.ids) - 1].log_softmax(-1)
        return -sum(step[token].item() for step, token in zip(steps, encoded.target, strict=True)), steps.argmax(-1)

    def greedy(self, prompt, ends, budget):
        """Output tokens up to one of `ends` or `budget`, the whole row recomputed for every token."""
        output = []
        while len(output) < budget and (not output or output[-1] not in ends):
            output.append(self.run([*prompt, *output])[0][-1].argmax().item())
        return output


@pytest.fixture(scope="session")
def by_hand():
    return ByHand


@pytest.fixture(scope="session")
def subject(model_folder, load, wrapped, random_transcoder):
    """One architecture: its plain model, its bridge, encoded rows, one patch and a set of patches."""
    plain, tokenizer = load(model_folder)
    d_model, bridge = plain.config.hidden_size, wrapped(model_folder)

    def patch(layer: int) -> Patch:
        base = random_transcoder(d_model, 96, layer, seed=layer)
        return Patch(Site(layer), base, random_transcoder(d_model, 12, layer, seed=50 + layer, bias=False))

    return SimpleNamespace(
        folder=model_folder,
        plain=plain,
        tokenizer=tokenizer,
        bridge=bridge,
        passes=Passes(bridge),
        rows=ROWS,
        encoded=[encode_row(tokenizer, row) for row in ROWS],
        patch=[patch(1)],
        patches=[patch(0), patch(2)],
        d_model=d_model,
    )


@pytest.fixture(scope="module")
def base_folder(model_folder, altered, tmp_path_factory):
    """The model before finetuning: other MLPs."""
    return altered(model_folder, tmp_path_factory.mktemp("before"), "mlp")


@pytest.fixture(scope="module", params=sorted(SETS))
def path_sites(request, subject, base_folder, random_transcoder):
    layers, at_bos = SETS[request.param]
    paths = read_paths(subject.bridge, base_folder, mlp_sites(layers))
    found = []
    for layer in layers:
        delta = random_transcoder(subject.d_model, 12, layer, seed=50 + layer, bias=False)
        if layer in at_bos:
            delta = with_bos(delta, 3 * torch.randn(subject.d_model, generator=torch.Generator().manual_seed(layer)))
        found.append(Patch(Site(layer), paths[Site(layer)], delta))
    return found
