"""What holds for each architecture, tried on small random models.

    python -m tests.models.table > docs/architectures.md

In: nothing. Out: the page, one line an architecture, tried out by `tried`; a test compares it with the page.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from data.encoding import encode_row, pad_left
from data.rows import make_row
from evaluators.measures.checks import ROUNDING, change_checks, exactness_checks
from evaluators.splice.interventions import Edit, Patch, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import forward
from models.adopted import check_pair
from models.architectures import MISSING, WITHOUT_MLP, check_architecture, kinds_of
from models.blocks import read_paths, sites_with
from models.bridge import wrap
from models.comparison import compare
from models.rest import read_rest
from models.sources import load_model, model_facts
from models.tiny import byte_tokenizer
from models.transcoder import Transcoder
from models.weights import open_weights
from sites import KINDS, MLP, Site
from trainers.activations import Pairs
from trainers.base_transcoder import BaseSettings, train_bases
from trainers.capture import Columns, capture_batch
from trainers.delta_data import DeltaData, mean_square, output_variance, residual_of
from trainers.delta_transcoder import DeltaSettings, train_delta
from trainers.lora import LoraSettings, Splits, train_lora

LLAMA: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
}
NEOX = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
GPT = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48}
NEO = {
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 48,
    "attention_types": [[["global"], 3]],
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 2 and 3, SmolLM2", LLAMA),
    "qwen2": ("Qwen2, Qwen2.5", LLAMA),
    "qwen3": ("Qwen3", LLAMA),
    "gemma": ("Gemma", LLAMA),
    "gemma2": ("Gemma 2", LLAMA),
    "gemma3_text": ("Gemma 3, text", LLAMA),
    "mistral": ("Mistral", LLAMA),
    "phi3": ("Phi-3, Phi-4", LLAMA),
    "gpt2": ("GPT-2", GPT),
    "gpt_neo": ("GPT-Neo", NEO),
    "gpt_neox": ("Pythia: attention and MLP in parallel", NEOX),
    "smollm3": ("SmolLM3", LLAMA),
    "granite": ("Granite with a `residual_multiplier` of 1; others are refused", LLAMA),
    "starcoder2": ("StarCoder2", LLAMA),
    "glm": ("GLM-4 (9B)", LLAMA),
    "glm4": ("GLM-4 (0414)", LLAMA),
    "nemotron": ("Nemotron, Minitron", LLAMA),
    "arcee": ("AFM", LLAMA),
    "ernie4_5": ("ERNIE 4.5", LLAMA),
    "seed_oss": ("Seed-OSS", LLAMA),
    "hunyuan_v1_dense": ("Hunyuan, dense", LLAMA),
    "phi": ("Phi-1, Phi-2", {**NEOX, "num_attention_heads": 3}),
    "gptj": ("GPT-J", {**GPT, "rotary_dim": 4}),
    "cohere": ("Command R", LLAMA),
    "cohere2": ("Command R7B", LLAMA),
    "falcon": ("Falcon (7B)", NEOX),
    "gpt_oss": ("gpt-oss", {**LLAMA, "num_local_experts": 4}),
    "opt": ("OPT", {**NEOX, "ffn_dim": 48, "word_embed_proj_dim": 24}),
}
COLUMNS = (
    "`mlp`",
    "`qkv`",
    "`o`",
    "all of these",
    "alpha 0 of everything = the un-finetuned model",
    "LoRA trains",
    "change deltas train",
    "bases and residual deltas train",
)
KINDS_TRIED = (["mlp"], ["qkv"], ["o"], ["qkv", "o", "mlp"])
ROWS = [make_row("12 + 30?", "42", ""), make_row("Seven times a lot of words", "no", ""), make_row("x", "yes", "")]


def build(name: str, folder: Path) -> Path:
    """A random model of three layers, whose norms and biases matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **CONFIGS[name][1], **special)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if any(part in parameter_name for part in ("norm", "ln_", "ln1", "ln2")):
                    parameter.uniform_(0.3, 3.0)
                elif "bias" in parameter_name:
                    parameter.normal_()
                else:
                    parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tried(name: str, folder: Path) -> str:
    """The table's line of an architecture."""
    before, after = build(name, folder / "before"), folder / "after"
    model, tokenizer = load_model(before, torch.float32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "norm" in parameter_name or "ln_" in parameter_name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(after)
    tokenizer.save_pretrained(after)
    check_architecture(before, name)
    check_pair(before, after, name)
    found = [*_exact(before, after), _lora_trains(before), *_deltas_train(before, after)]
    cells = " | ".join("-" if one is None else "yes" if one else "no" for one in found)
    return f"| `{name}` | {CONFIGS[name][0]} | {cells} |"


def _exact(before: Path, after: Path) -> list[bool | None]:
    """The first five answers: the checks that every sweep makes, on one layer and on two, kind by kind and together."""
    bridge = wrap(*load_model(after, torch.float32))
    known = {kind.name for kind in kinds_of(model_facts(after)["architecture"])}
    holds: list[bool | None] = []
    for asked in KINDS_TRIED:
        kinds, checks = [kind for kind in asked if kind in known], []
        if not kinds:
            holds.append(None)
            continue
        for layers in ((1,), (0, 2)):
            sites = [Site(layer, KINDS[kind]) for layer in layers for kind in kinds]
            ground, own, other = (read_paths(bridge, one, sites) for one in (before, after, before))
            patches = [Patch(site, path, _random_delta(site, path.d_in, path.d_out)) for site, path in ground.items()]
            checks += change_checks(bridge, ROWS, patches, other, own)
            checks += exactness_checks(bridge, ROWS, patches, Limits(4))
        holds.append(all(one["passed"] for one in checks))
    return [*holds, _alpha_0_is_the_plain_model(bridge, before, after)]


@torch.inference_mode()
def _alpha_0_is_the_plain_model(bridge: Any, before: Path, after: Path) -> bool:
    """Every un-finetuned site put back, with the rest, gives what the un-finetuned model gives without a bridge: all
    weights differ."""
    plain, tokenizer = load_model(before, torch.float32)
    changed = compare(open_weights(before), open_weights(after)).changed
    sites, rest = sites_with(plain.config, changed)
    patches = [Patch(site, path) for site, path in read_paths(bridge, before, sites).items()]
    batch = pad_left([encode_row(tokenizer, row).ids for row in ROWS], tokenizer.pad_token_id)
    with read_rest(before, rest).at(bridge, 0.0), spliced(bridge, Edit(patches, "no_delta")) as splice:
        splice.reset(batch.editable, torch.ones(len(ROWS)))
        ours = forward(bridge, batch, batch.ids.shape[1])
    theirs = plain(**batch.inputs).logits
    return torch.allclose(
        ours[batch.mask], theirs[batch.mask], atol=ROUNDING[torch.float32] * theirs.abs().max().item(), rtol=0
    )


def _random_delta(site: Site, d_in: int, d_out: int) -> Transcoder:
    generator = torch.Generator().manual_seed(site.layer)
    return Transcoder(
        W_enc=torch.randn(d_in, 6, generator=generator) / d_in**0.5,
        b_enc=torch.zeros(6),
        threshold=torch.full((6,), 0.4),
        W_dec=torch.randn(6, d_out, generator=generator),
        b_dec=None,
        site=site,
    )


def _lora_trains(folder: Path) -> bool:
    """The validation loss falls."""
    model, tokenizer = load_model(folder, torch.float32)
    settings = LoraSettings(r=4, lr=5e-3, batch_size=3, steps=8, eval_every=4, seed=0)
    reports: list[dict[str, Any]] = []
    adapter = folder / "adapter"
    train_lora(model, tokenizer, Splits(ROWS, ROWS), settings, reports.append, lambda one: one.save_pretrained(adapter))
    check_pair(folder, adapter, "the same model")
    return reports[-1]["val_loss"] < reports[0]["val_loss"]


def _deltas_train(before: Path, after: Path) -> list[bool | None]:
    """Both kinds explain part of what they are trained on, on other tokens; without MLPs there are no bases."""
    bridge = wrap(*load_model(after, torch.float32))
    kind = kinds_of(model_facts(after)["architecture"])[-1]
    site = Site(1, kind)
    path = read_paths(bridge, before, [site])[site]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 200, (60, 30), generator=generator).tolist()
    found = capture_batch(bridge, [[2, *row] for row in ids], {site: Columns(True, path)})[site]
    x, y, change = (found[name].float().split([1400, len(found["x"]) - 1400]) for name in ("x", "y", "change"))
    settings = DeltaSettings(d_new=24, lr=1e-2, sparsity=1e-5, epochs=6, batch_size=200, l0_budget=24)
    pairs = [Pairs([one]) for one in zip(x, change, strict=True)]
    data = DeltaData(*pairs, mean_square(Pairs([(change[1],)])), 1.0, site, "change")
    explained = train_delta(data, settings).figures["val_unexplained"]

    if kind != MLP:
        return [explained < 1, None]
    outputs = [Pairs([one]) for one in zip(x, y, strict=True)]
    (base,) = train_bases(*outputs, BaseSettings([8.0], width=64, epochs=4, batch_size=200, lr=3e-3), site=site)
    left = [Pairs([(one, residual_of(base.transcoder, one, other))]) for one, other in zip(x, y, strict=True)]
    data = DeltaData(*left, output_variance(outputs[1]), base.facts["val_fvu"], site)
    figures = train_delta(data, dataclasses.replace(settings, l0_budget=12)).figures
    return [explained < 1, base.facts["val_fvu"] < 1 and figures["val_fvu"] < figures["val_fvu_base"]]


def page(lines: list[str]) -> str:
    reasons = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(MISSING.items()))
    without = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(WITHOUT_MLP.items()))
    table = "\n".join(lines)
    return f"""# Architectures

This table says which architectures work. Each row is a small random model of one; `python -m tests.models.table` runs
the checks, and a test repeats them. The columns `mlp`, `qkv` and `o` test one kind of site at a time, "all of these"
tests them together. "yes" means that four checks passed there: putting back a site's own output gives the finetuned
model; alpha 0 gives the model with un-finetuned weights at those sites; alpha 1, with the true change in place of a
delta, gives the finetuned model; decoding with a cache gives the same text as without. The column after them is for a
model with all weights finetuned: alpha 0 at all sites, and in everything outside them (the [rest](concepts.md#sites)),
must give the un-finetuned model. Every sweep runs these checks on your own model too.

| architecture | such as | {" | ".join(COLUMNS)} |
|---|---|{"---|" * len(COLUMNS)}
{table}

Where `mlp` is "-", attention gets deltas and the MLPs do not; what finetuning changed in them goes with the rest:

| architecture | why its MLPs are not sites |
|---|---|
{without}

Not supported, and refused before any work:

| architecture | what is missing |
|---|---|
{reasons}

Others that TransformerLens' bridge can wrap may work. A model whose logits the bridge changes is refused when it is
loaded, and the checks of the sweep say whether the rest holds.
"""


def main() -> None:
    lines = []
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(tried(name, Path(folder)))
        print(name, file=sys.stderr)
    print(page(lines), end="")


if __name__ == "__main__":
    main()
