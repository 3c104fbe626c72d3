"""The evaluation grid computed in three ways in one run: one prompt at a time, batched, and ours.

    python -m benchmarks.evaluation_grid [quickstart storage.root=mlruns] [--layers 12,18] [--kinds qkv,o,mlp]

In: a sweep that is finished up to its deltas. The grid is raw, no_delta, full and five alphas for each site on each
subset. The reference wraps the model once, then runs each cell separately: a teacher-forced pass and a cached greedy
generation with TransformerLens' own `generate`, with raw repeated for each layer; a random sample of its cells is timed
and scaled up. Out: prints the three times, their ratios, what each shortcut gains on a smaller grid, our time divided
by the time that unavoidable matrix products take at the machine's measured rate, and peak memory; fails if any figures
differ. The same grid with KL(raw || spliced) is timed too.
"""

from __future__ import annotations

import math
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from data.encoding import encode_row, pad_left
from data.rows import Row, read_rows
from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
from evaluators.splice.decoding import Stop
from evaluators.splice.interventions import Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, Prefixes, Shortcuts
from evaluators.splice.teacher_forcing import Reference
from models.blocks import hooks_at
from models.bridge import Hook, device_of, hooked, whole
from sites import Site, sites_label

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CELLS = (("raw", 0.0), ("no_delta", 0.0), ("full", 1.0), *(("alpha", alpha) for alpha in ALPHAS))
SAMPLED_PROMPTS, SAMPLED_BATCHES = 12, 3
ABLATED_PROMPTS = 5
"""Prompts per subset in the smaller grid, where each shortcut in turn is disabled."""


class Figures(NamedTuple):
    """What is compared per prompt and cell: cross-entropy in nats per token, and the greedy output."""

    ce: float
    output: list[int]


Table = dict[tuple[Site, str, float, str, int], Figures]  # site, condition, alpha, subset, prompt


def ours(
    bridge: Any,
    rows: dict[str, list[Row]],
    patches: Sequence[Patch],
    budget: int,
    shortcuts: Shortcuts = Shortcuts(),  # noqa: B008
    with_kl: bool = False,
) -> Table:
    """The whole grid. Strengths 0 and 1 are no_delta and full: measured once, stored twice."""
    table: Table = {}
    settings: dict[str, Any] = {"limits": Limits(budget), "behaviours": {}}
    plain = Passes(bridge, shortcuts=shortcuts)
    prefixes = Prefixes(bridge, [patch.site for patch in patches], together=shortcuts.capture_once)
    for subset, subset_rows in rows.items():
        outputs: list[list[int]] = []
        reference = Reference(bridge) if with_kl else None
        for patch in patches:
            if shortcuts.raw_once and outputs:
                table |= {
                    (patch.site, *key[1:]): figures
                    for key, figures in list(table.items())
                    if key[0] == patches[0].site and key[1] == "raw" and key[3] == subset
                }
            else:
                known_results = Known(reference=reference)
                ((_, figures, texts),) = evaluate_behaviour(
                    plain, (), subset_rows, [Ask("raw")], known=known_results, **settings
                )
                _file(table, (patch.site, "raw", 0.0, subset), figures, texts)
                outputs = [text["tokens"] for text in texts]
            answers = evaluate_behaviour(
                replace(plain, prefixes=prefixes if shortcuts.share_prefix else None),
                [patch],
                subset_rows,
                [Ask("alpha", alpha) for alpha in ALPHAS],
                known=Known(outputs, reference=reference),
                **settings,
            )
            for ask, figures, texts in answers:
                for condition, alpha in CELLS[1:]:
                    if alpha == ask.alpha:
                        _file(table, (patch.site, condition, alpha, subset), figures, texts)
    return table


def _file(table: Table, place: tuple[Site, str, float, str], figures: Sequence[Any], texts: Sequence[Any]) -> None:
    for row, text in zip(figures, texts, strict=True):
        table[*place, row["index"]] = Figures(row["nll"] / row["n_tokens"], text["tokens"])


def plain_cell(
    bridge: Any, rows: Sequence[Row], patch: Patch, condition: str, alpha: float, budget: int
) -> list[Figures]:
    """One cell for some prompts in one batch, as a script without any of our shortcuts would compute it."""
    encoded = [encode_row(bridge.tokenizer, row) for row in rows]
    pad, device = bridge.tokenizer.pad_token_id, device_of(bridge)
    with torch.inference_mode():
        batch = pad_left([row.ids for row in encoded], pad).to(device)
        with whole(bridge), hooked(bridge, _hooks(bridge, patch, condition, alpha, batch.editable)):
            logits = bridge(
                batch.ids, attention_mask=batch.mask.long(), position_ids=batch.positions, return_type="logits"
            )
        steps = logits[:, :-1].float().log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
        ces = [-steps[i, -len(row.target) :].mean().item() for i, row in enumerate(encoded)]
        prompts = pad_left([row.prompt for row in encoded], pad).to(device)
        with whole(bridge), hooked(bridge, _hooks(bridge, patch, condition, alpha, prompts.editable)):
            written = bridge.generate(
                prompts.ids,
                attention_mask=prompts.mask.long(),
                max_new_tokens=budget,
                do_sample=False,
                return_type="tokens",
                verbose=False,
            )
    stop = Stop.of(bridge, Limits(budget), rows[0])
    outputs = [written[i, prompts.ids.shape[1] :].tolist() for i in range(len(rows))]
    return [Figures(ce, stop.cut(output) or output) for ce, output in zip(ces, outputs, strict=True)]


def _hooks(bridge: Any, patch: Patch, condition: str, alpha: float, editable: Tensor) -> list[Hook]:
    if condition == "raw":
        return []
    inputs: dict[str, Tensor] = {}

    def read(x: Tensor) -> None:
        inputs["x"] = x

    def write(y: Tensor, part: slice) -> Tensor:
        ground = edited = patch.ground(inputs["x"])
        if condition != "no_delta" and patch.delta is not None:
            edited = edited + (1.0 if condition == "full" else alpha) * patch.transcoder(inputs["x"])
        whole = y.shape[:2] == editable.shape
        to_edit = editable if whole else torch.ones_like(y[..., 0], dtype=torch.bool)
        elsewhere = ground
        if whole and condition != "no_delta" and patch.delta is not None and patch.delta.at_bos is not None:
            elsewhere = ground + (1.0 if condition == "full" else alpha) * (patch.delta.at_bos @ patch.transcoder.W_dec)
        unedited = y if patch.path is None else elsewhere[..., part]
        return torch.where(to_edit.unsqueeze(-1), edited[..., part].to(y.dtype), unedited)

    return hooks_at(bridge, patch.site, read, write)


def compare(table: Table, key: tuple[Site, str, float, str, int], plain: Figures) -> None:
    """Raises SystemExit if our figures differ from those of the plain computation."""
    mine = table[key]
    if mine.output != plain.output or abs(mine.ce - plain.ce) > 1e-4:
        raise SystemExit(f"{key}: ours {mine}, plain {plain}")


def matmul_rate(device: Any, size: int = 2048, tries: int = 6) -> float:
    """FLOP/s of a large fp32 matrix product, the best of several tries."""
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    best = math.inf
    for _ in range(tries):
        best = min(best, timed(lambda: left @ right, device)[0])
    return 2 * size**3 / best


def unavoidable_flops(bridge: Any, rows: dict[str, list[Row]], patches: Sequence[Patch], table: Table) -> float:
    """FLOPs of the products with weights that any exact method needs: each text once below a layer and once per
    strength above it, one projection per target token, and an output's tokens from where it departs from both the
    target and the raw output."""
    model = bridge.original_model
    body = sum(weight.numel() for weight in bridge.blocks.parameters() if weight.ndim == 2)
    a_layer, head = body / bridge.cfg.n_layers, model.get_output_embeddings().weight.numel()
    total = 0.0
    for subset, subset_rows in rows.items():
        for number, row in enumerate(subset_rows):
            encoded = encode_row(bridge.tokenizer, row)
            raw = table[patches[0].site, "raw", 0.0, subset, number].output
            new = beyond(raw, [encoded.target])
            total += len(encoded.ids) * body + len(encoded.target) * head + new * (body + head)
            for patch in patches:
                above = (bridge.cfg.n_layers - 1 - patch.site.layer) * a_layer
                features = sum(coder.W_enc.numel() * 2 for coder in (patch.base, patch.transcoder) if coder is not None)
                total += (len(encoded.ids) + new) * features
                for alpha in ALPHAS:
                    output = table[patch.site, "alpha", alpha, subset, number].output
                    off_target = beyond(output, [encoded.target])
                    off_both = beyond(output, [encoded.target, raw])
                    total += len(encoded.ids) * above + len(encoded.target) * head
                    total += (off_target - off_both) * (above + head) + off_both * (body + head)
    return 2 * total


def beyond(output: Sequence[int], guesses: Sequence[Sequence[int]]) -> int:
    """Number of tokens in an output after the longest prefix that it shares with one of the guesses."""
    shared = 0
    for guess in guesses:
        agreed = 0
        while agreed < min(len(guess), len(output)) and guess[agreed] == output[agreed]:
            agreed += 1
        shared = max(shared, agreed)
    return len(output) - shared


def timed(run: Callable[[], Any], device: Any) -> tuple[float, Any]:
    """The seconds that `run` takes, and what it returns."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
    layers: Annotated[str, typer.Option()] = "12,18",
    kinds: Annotated[str, typer.Option(help="Kinds of site, each site by itself.")] = "mlp",
    deltas: Annotated[str, typer.Option(help="change or residual; default: the first of deltas.targets.")] = "",
    prompts: Annotated[int, typer.Option(help="Prompts per subset.")] = 20,
    budget: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    ablate: Annotated[bool, typer.Option(help="Also time with each shortcut off.")] = True,
    seed: Annotated[int, typer.Option(help="Seed for sampling the reference's cells.")] = 0,
) -> None:
    # Imported here, because benchmarks.gpu uses the rest of this file without Ray installed.
    from jobs.commands.load import DeltaChoice, combination, load_bridge, load_patches
    from jobs.context.context import Context
    from search_spaces.load import load

    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    bridge = load_bridge(context)
    device = device_of(bridge)
    numbers = list(map(int, layers.split(",")))
    chosen_deltas = combination(context, DeltaChoice(deltas or None))
    patches = [
        patch.to(device)
        for patch in load_patches(context, numbers, chosen_deltas, bridge)
        if patch.site.kind.name in kinds.split(",")
    ]
    all_rows = list(read_rows(str(context.space.data / "evaluation.jsonl")))
    rows = {
        subset: [row for row in all_rows if row.label == subset][:prompts] for subset in ("tool", "copy", "tool_ood")
    }
    cells = [(patch, *cell, subset) for patch in patches for cell in CELLS for subset in rows]
    typer.echo(
        f"{len(cells)} cells of {prompts} prompts, {budget} new tokens, sites {sites_label(p.site for p in patches)}, "
        f"{'base transcoders' if patches[0].path is None else 'un-finetuned paths'}; {device}, "
        f"{torch.get_num_threads()} threads"
    )
    seconds, table = timed(partial(ours, bridge, rows, patches, budget), device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    flops, rate = unavoidable_flops(bridge, rows, patches, table), matmul_rate(device)
    typer.echo(f"ours                 {seconds:9.1f} s   {memory:.2f} GiB peak")
    by_kind = {patch.site.kind: [other for other in patches if other.site.kind == patch.site.kind] for patch in patches}
    if len(by_kind) > 1:
        costs = {
            kind: timed(partial(ours, bridge, rows, some, budget), device)[0] / len(some)
            for kind, some in by_kind.items()
        }
        for kind, cost in costs.items():
            typer.echo(
                f"  a site of {kind.name:<12} {cost:7.1f} s   {cost / min(costs.values()):.2f}x the cheapest kind"
            )
    with_kl, _ = timed(partial(ours, bridge, rows, patches, budget, with_kl=True), device)
    typer.echo(f"ours with KL         {with_kl:9.1f} s   {with_kl / seconds:.2f}x ours")
    typer.echo(
        f"unavoidable matmuls  {flops / rate:9.1f} s   {flops / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s; "
        f"ours takes {seconds * rate / flops:.2f}x"
    )
    chance = random.Random(seed)
    for label, sample, count, size in (
        ("one by one", SAMPLED_PROMPTS, len(cells) * prompts, 1),
        ("batched", SAMPLED_BATCHES, len(cells), prompts),
    ):
        spent = 0.0
        for patch, condition, alpha, subset in chance.sample(cells, sample):
            first = chance.randrange(prompts) if size == 1 else 0
            chosen = rows[subset][first : first + size]
            took, plain_figures = timed(partial(plain_cell, bridge, chosen, patch, condition, alpha, budget), device)
            spent += took
            for number, figures in enumerate(plain_figures):
                compare(table, (patch.site, condition, alpha, subset, first + number), figures)
        whole = spent / sample * count
        typer.echo(
            f"{label:<20} {whole:9.1f} s   {whole / seconds:.1f}x ours (from {sample} of {count}, equal to ours)"
        )
    if ablate:
        _ablations(bridge, rows, patches, budget, device)


def _ablations(bridge: Any, rows: dict[str, list[Row]], patches: Sequence[Patch], budget: int, device: Any) -> None:
    """Times a few prompts per subset with each shortcut off, relative to all of them on."""
    few = {subset: subset_rows[:ABLATED_PROMPTS] for subset, subset_rows in rows.items()}
    on, expected = timed(partial(ours, bridge, few, patches, budget), device)
    typer.echo(f"{ABLATED_PROMPTS} prompts per subset, all shortcuts: {on:.1f} s; relative time with one off:")
    for shortcut in fields(Shortcuts):
        shortcuts = replace(Shortcuts(), **{shortcut.name: False})
        off, table = timed(partial(ours, bridge, few, patches, budget, shortcuts), device)
        for key, figures in table.items():
            compare(expected, key, figures)
        typer.echo(f"  {shortcut.name:<20} {off / on:6.2f}x")


if __name__ == "__main__":
    typer.run(main)
