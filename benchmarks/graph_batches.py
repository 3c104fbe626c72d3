"""Backward passes of an attribution graph, one target at a time and several at once.

    python -m benchmarks.graph_batches quickstart storage.root=mlruns

In: a finished sweep with change deltas. Out: prints the seconds of processor time for the same targets, by how many
share a backward pass, and the ratio to one at a time. A test compares their slopes.
"""

from __future__ import annotations

import random
import time
from typing import Annotated

import typer

PROMPT = (
    "I am preparing the yearly accounts of our shop, and there is one figure that I cannot check: what is 1250 / 48?"
)


def main(
    config: Annotated[str, typer.Argument(help="A settings file or preset.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    prompt: Annotated[str, typer.Option()] = PROMPT,
    targets: Annotated[int, typer.Option(min=1, help="Targets drawn from all active features.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 3,
) -> None:
    from data.encoding import encode_prompt
    from evaluators.measures.direct_effects import Output, Place, held_model
    from jobs.cli.options import context_of
    from jobs.commands.load import DeltaChoice, combination, load_bridge, load_patches, prompt_row
    from models.frozen import Frozen

    context = context_of(config, overrides)
    bridge = load_bridge(context)
    patches = load_patches(context, None, combination(context, DeltaChoice("change")), bridge)
    ids = encode_prompt(bridge.tokenizer, prompt_row(context, prompt))
    with held_model(bridge, patches, Output(ids, 0)) as model:
        model.effects([None], Frozen())  # the pass forward
        active = [Place(site, *pair) for site, acts in model.acts.items() for pair in (acts > 0).nonzero().tolist()]
        active = [place for place in active if place.position > 0]
        chosen = sorted(random.Random(0).sample(active, targets))
        alone = 0.0
        for count in (1, 2, 4, 8, 16):
            seconds = []
            for _ in range(repeats):
                started = time.process_time()
                for start in range(0, targets, count):
                    model.effects(chosen[start : start + count], Frozen())
                seconds.append(time.process_time() - started)
            alone = alone or min(seconds)
            typer.echo(f"{count} at once: {min(seconds):.2f} s, {alone / min(seconds):.2f} times as fast as alone")
    typer.echo(f"{targets} targets, {len(ids)} tokens, {len(patches)} sites")


if __name__ == "__main__":
    typer.run(main)
