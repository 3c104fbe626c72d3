"""The computations of the device checks: every trainer and the evaluation, on models and shapes that take seconds.

In: a scratch folder, a device and a number format. Out: figures, (any number,) on the CPU, that should agree across
devices. Nothing here needs Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.rows import Row
from sites import Site, mlp_sites

if TYPE_CHECKING:
    from torch import Tensor

    from evaluators.splice.interventions import Patch
    from models.transcoder import Transcoder
    from trainers.delta_data import DeltaData
    from trainers.joint_polish import Subject

ROWS = [
    *(Row(f"What is {n} + 2?", f"The sum of {n} and 2 is {n + 2}.", "sum") for n in (1, 22, 333)),
    Row("Seven", "Seven", "copy"),
    Row("A context sentence that makes this prompt much longer than the window: 8 times 7, please?", "no", "other"),
]
"""One prompt is longer than the tiny Gemma-2's sliding window of 64 tokens."""
SITES = tuple(mlp_sites([0, 2]))


def models(scratch: Path) -> dict[str, Path]:
    """A tiny Gemma-2 and a tiny Llama under `scratch`, each also un-finetuned (`-before`), with other MLPs."""
    import torch

    from models.sources import load_model
    from models.tiny import build_tiny_gemma2, build_tiny_llama

    folders = {name: scratch / name for name in ("gemma", "llama")}
    for name, build in {"gemma": build_tiny_gemma2, "llama": build_tiny_llama}.items():
        before = folders[f"{name}-before"] = scratch / f"{name}-before"
        if not before.is_dir():
            build(folders[name], 0)
            model, tokenizer = load_model(folders[name], torch.float32)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "mlp" in parameter_name:
                        parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(before)
            tokenizer.save_pretrained(before)
    return folders


@cache
def pairs(tokens: int = 6000, d_model: int = 64) -> DeltaData:
    """x, and a noisy change that three sparse features compute from it."""
    import torch

    from trainers.activations import Pairs
    from trainers.delta_data import DeltaData, mean_square

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    encoder, decoder, x = normal(d_model, 3) / d_model**0.5, normal(3, d_model), normal(tokens, d_model).bfloat16()
    change = (torch.relu(x.float() @ encoder - 0.8) @ decoder + 0.1 * normal(tokens, d_model)).bfloat16()
    cut = tokens * 4 // 5
    train = Pairs(list(zip(x[:cut].split(2000), change[:cut].split(2000), strict=True)))
    held_out = Pairs([(x[cut:], change[cut:])])
    return DeltaData(train, held_out, mean_square(Pairs([(change[cut:],)])), 1.0, Site(0), "change")


def transcoder(d_model: int, d_sae: int, layer: int, bias: bool) -> Transcoder:
    import torch

    from models.transcoder import Transcoder

    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Transcoder(
        W_enc=normal(d_model, d_sae) / d_model**0.5,
        b_enc=0.1 * normal(d_sae),
        threshold=0.4 + 0.4 * torch.rand(d_sae, generator=generator),
        W_dec=0.1 * normal(d_sae, d_model),
        b_dec=0.1 * normal(d_model) if bias else None,
        site=Site(layer),
    )


def delta_training(scratch: Path, device: str, precision: str) -> Tensor:
    """The loss of every step of two deltas side by side, and the last validation."""
    import torch

    from trainers.delta_transcoder import DeltaSettings, train_delta

    losses: list[Tensor] = []
    settings = DeltaSettings(
        d_new=16, lr=1e-2, sparsity=1e-4, epochs=3, batch_size=200, l0_budget=3.0, replicas=2, precision=precision
    )
    done = train_delta(
        pairs(), settings, device=device, on_step=lambda loss: losses.append((1 + loss.error + loss.penalty).cpu())
    )
    figures = [done.figures[name] for name in ("val_unexplained", "val_l0_delta", "val_cos")]
    return torch.cat([*losses, torch.tensor(figures)])


def base_training(scratch: Path, device: str, precision: str) -> Tensor:
    """The unexplained share of the last batch and of the validation pairs, for two sparsities side by side."""
    import torch

    from trainers.base_transcoder import BaseSettings, train_bases

    losses: list[float] = []
    settings = BaseSettings(target_l0=(4, 8), width=128, epochs=3, batch_size=200, lr=3e-3, precision=precision)
    done = train_bases(
        pairs().train,
        pairs().validation,
        settings,
        site=Site(0),
        device=device,
        report=lambda step, steps, figures: losses.append(figures["train_fvu"]),
    )
    return torch.tensor([*losses, *(base.facts["val_fvu"] for base in done)])


def lora_training(kind: str) -> Callable[[Path, str, str], Tensor]:
    """The losses of a short run, which covers the fused forward pass and attention with and without a window."""

    def figures(scratch: Path, device: str, precision: str) -> Tensor:
        import torch

        from models.sources import load_model
        from trainers.lora import LoraSettings, Splits, train_lora
        from trainers.precision import number_format

        found: list[dict[str, Any]] = []
        settings = LoraSettings(r=4, lr=3e-3, batch_size=3, steps=8, eval_every=2, seed=1)
        with number_format(device, precision) as dtype:
            model, tokenizer = load_model(models(scratch)[kind], dtype, device)
            train_lora(model, tokenizer, Splits(ROWS, ROWS), settings, found.append, lambda adapted: None)
        return torch.tensor([figures[name] for figures in found for name in ("val_loss", "train_loss")])

    return figures


def capture(scratch: Path, device: str, precision: str) -> Tensor:
    """The taps' inputs and outputs, the change, and the change at BOS."""
    import torch

    from data.encoding import encode_text
    from models.blocks import read_paths
    from trainers.capture import Columns, bos_changes, capture_batch

    bridge, folders = _bridge(scratch, "gemma", device, precision), models(scratch)
    before, after = (read_paths(bridge, folders[name], SITES, torch.float32) for name in ("gemma-before", "gemma"))
    columns = {site: Columns(True, before[site], after[site]) for site in SITES}
    texts = [encode_text(bridge.tokenizer, row.input) for row in ROWS]
    found = capture_batch(bridge, texts, columns)
    at_bos = bos_changes(bridge, bridge.tokenizer.bos_token_id, before, after)
    parts = [one for site in SITES for _, one in sorted(found[site].items())]
    return torch.cat([(tensor.float() / tensor.float().norm()).flatten() for tensor in [*parts, *at_bos.values()]])


def polish(scratch: Path, device: str, precision: str) -> Tensor:
    """The KL at every validation of a joint polish."""
    import torch

    from data.encoding import encode_row
    from trainers.joint_polish import PolishSettings
    from trainers.joint_polish import polish as train

    subject = polish_subject(scratch, device, precision)
    encoded = [encode_row(subject.bridge.tokenizer, row) for row in ROWS]
    done = train(subject, encoded, encoded, PolishSettings(steps=12, lr=1e-3, rows=3, precision=precision))
    return torch.tensor([validation["val_kl"] for validation in done.history])


def polish_subject(scratch: Path, device: str, precision: str) -> Subject:
    from trainers.joint_polish import Subject

    bridge = _bridge(scratch, "gemma", device, precision)
    patches = _patches(bridge, models(scratch)["gemma-before"])
    paths = {patch.site: patch.path for patch in patches if patch.path is not None}
    return Subject(bridge, paths, {patch.site: patch.transcoder for patch in patches}, dict.fromkeys(SITES, 0.1))


def evaluation(kind: str, ground: str) -> Callable[[Path, str, str], Tensor]:
    """Cross-entropy, KL, activations and greedy tokens per row, at every strength and for every control that is a
    delta; and the few-features curve."""

    def figures(scratch: Path, device: str, precision: str) -> Tensor:
        import torch

        from evaluators.measures.curve import evaluate_curve, rank_features
        from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
        from evaluators.measures.reconstruction import site_activations
        from evaluators.splice.limits import Limits
        from evaluators.splice.passes import Passes
        from evaluators.splice.second_moments import Moments
        from evaluators.splice.substitutes import SUBSTITUTES, Material
        from evaluators.splice.teacher_forcing import Reference

        bridge = _bridge(scratch, kind, device, precision)
        patches = _patches(bridge, models(scratch)[f"{kind}-before"] if ground == "path" else None)
        passes, reference = Passes(bridge), Reference(bridge)
        known = Known(reference=reference)
        found: list[float] = []

        def measure(where: Sequence[Patch], *asks: Ask) -> None:
            for _, of_rows, texts in evaluate_behaviour(
                passes, where, ROWS, asks, limits=Limits(12), behaviours={}, known=known
            ):
                found.extend(row["nll"] for row in of_rows)
                found.extend(row.get("kl", 0.0) for row in of_rows)
                found.extend(row["sum_abs_delta_acts"] for row in of_rows)
                if precision == "fp32":
                    found.extend(float(token) for text in texts for token in text["tokens"])

        measure((), Ask("raw"))
        measure(patches, Ask("no_delta"), Ask("full"), *(Ask("alpha", alpha) for alpha in (-0.5, 0.5, 2.0)))
        for name in ("random_delta", "shuffled_delta", "dense_delta"):
            made = []
            for patch in patches:
                x, y = site_activations(passes, patch, ROWS)
                material = Material(partial(torch.as_tensor, x), partial(Moments.of, [(x, y)]), 0)
                made.append(SUBSTITUTES[name](patch, material))
            measure(made, Ask(name))
        ranked = rank_features(passes, patches, ROWS)
        curve = evaluate_curve(passes, patches, ROWS, ranked, reference=reference)
        found.extend(row["nll"] for rows in curve.values() for row in rows)
        return torch.tensor(found)

    return figures


def _bridge(scratch: Path, kind: str, device: str, precision: str) -> Any:
    from models.bridge import wrap
    from models.sources import load_model
    from trainers.precision import dtype_of

    return wrap(*load_model(models(scratch)[kind], dtype_of(precision), device))


def _patches(bridge: Any, before: Path | None) -> list[Patch]:
    """Random deltas on the un-finetuned paths of `before`, or on random bases."""
    from evaluators.splice.interventions import Patch
    from models.blocks import read_paths
    from models.bridge import device_of
    from models.transcoder import with_bos

    d_model, paths = bridge.cfg.d_model, {} if before is None else read_paths(bridge, before, SITES)
    patches = []
    for site in SITES:
        delta = transcoder(d_model, 12, site.layer, bias=False)
        if before is not None:
            delta = with_bos(delta, 0.1 * delta.W_dec[0])
        patches.append(Patch(site, paths.get(site) or transcoder(d_model, 48, site.layer, bias=True), delta))
    return [patch.to(device_of(bridge)) for patch in patches]
