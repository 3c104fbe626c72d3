"""The attribution graph of one prompt: which delta features, at which positions, lead to the model's answer.

In: a bridge, patches of change deltas, a prompt. Out: a `Graph` of direct effects between active features, BOS
features, un-finetuned parts (`rest`) and the output, pruned to what matters, and checked against running the model
without single features. After Ameisen et al. 2025 (transformer-circuits.pub, attribution graphs): |effects| into a node
are normalised to sum to 1, and influence on the output is the sum over all paths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.encoding import Encoded, encode_prompt, pad_left
from data.rows import DataError, Row
from evaluators.measures.direct_effects import Effects, HeldModel, Output, Place, held_model
from evaluators.measures.features import moved_from
from evaluators.measures.influence import Incoming, Link, prune
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, forward, resume
from evaluators.splice.teacher_forcing import Job
from evaluators.tables.statistics import Estimate, pearson
from models.bridge import device_of
from models.frozen import Frozen, check_frozen
from models.rest import Rest
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BATCH = 16
"""Nodes expanded before influence is computed again."""
TOGETHER = 4
"""Nodes per backward pass; in a larger batch, those at low layers would wait for those at high ones."""
ROWS = 8
"""Sources removed in one pass of a check, each in a row of its own."""
NAMED = 256
"""Number of most influential nodes whose promoted tokens are computed."""
PROMOTED = 5
"""Tokens listed for a feature that writes to the residual stream."""


class GraphOptions(NamedTuple):
    """`frozen`: what gradients treat as constant; nothing by default, since that predicts best. `max_expanded`: nodes
    whose incoming edges are computed. Thresholds: the shares of influence that the kept nodes, and edges, make up.
    `checked`: edges of each sample that are checked."""

    frozen: Frozen = Frozen()
    max_expanded: int = 64
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    checked: int = 32
    seed: int = 0


class Node(NamedTuple):
    """A node of the graph. `kind` is feature, bos, rest or output; `place` is None for the last two. `influence` is the
    share of influence on the output that passes through it."""

    kind: str
    place: Place | None
    activation: float
    influence: float
    promoted: Sequence[str] = ()


class Edge(NamedTuple):
    """A source's direct effect on a target's pre-activation, or on the output; both as numbers in `Graph.nodes`."""

    source: int
    target: int
    weight: float


class Check(NamedTuple):
    """An edge, whose weight is the prediction; by how much the target really falls without the source; and the sample
    that the edge is from, random or strongest."""

    edge: Edge
    measured: float
    sample: str


class Graph(NamedTuple):
    """Nodes are features in order of site, position and feature, then `rest`, then the output.

    `value` is the output in the spliced model, `value_without` with all deltas off, and `probability` that of the
    token whose logit it has. `next_tokens` are the tokens that the finetuned, the un-finetuned and the spliced model
    choose after the text. `active` counts active features by position, `expanded` the nodes whose edges were
    computed. `total_influence` is the sum over all features and `rest`, also those that are not in the graph.
    """

    output: Output
    options: GraphOptions
    nodes: list[Node]
    edges: list[Edge]
    checks: list[Check]
    value: float
    value_without: float
    probability: float
    next_tokens: tuple[int, int, int]
    active: int
    expanded: int
    total_influence: float
    n_layers: int

    def correlation(self, sample: str) -> Estimate | None:
        """Pearson's r of prediction and measurement, with its bootstrap interval; None for fewer than 3 checks."""
        rows = [check for check in self.checks if check.sample == sample]
        if len(rows) < 3:
            return None
        return pearson([row.edge.weight for row in rows], [row.measured for row in rows], seed=self.options.seed)


Step = Callable[[str, int, int], None]
"""Called with the name of a part of the work, how many of its units are done, and how many there are."""


def attribution_graph(
    bridge: TransformerBridge,
    patches: Sequence[Patch],
    output: Output,
    next_tokens: tuple[int, int],
    options: GraphOptions,
    step: Step = lambda name, done, total: None,
) -> Graph:
    """The graph of the spliced model, all deltas at full strength. `next_tokens` are the tokens that the
    finetuned and the un-finetuned model choose after the text.

    Raises ModelError if what `options` freeze cannot be frozen in this model.
    """
    check_frozen(bridge, options.frozen)
    with held_model(bridge, patches, output) as model:
        features = _Features.of(model)
        incoming = _expanded(model, features, options, step)
        shown, links = prune(incoming, options.node_threshold, options.edge_threshold)
        checks = _checks(model, features, incoming, links, options, step)
        without, logits = model.value_without_deltas(), model.logits
    influence = incoming.influence()
    strongest = sorted(shown, key=lambda number: -influence[number])[:NAMED]
    promoted = _promoted(bridge, patches, output.ids, [features.places[number] for number in strongest])
    nodes = [features.node(number, float(influence[number]), promoted) for number in shown]
    numbers = {number: index for index, number in enumerate([*shown, incoming.rest, incoming.output])}
    nodes += [Node("rest", None, 0.0, float(influence[incoming.rest])), Node("output", None, 0.0, 1.0)]
    return Graph(
        output=output,
        options=options,
        nodes=nodes,
        edges=[Edge(numbers[link.source], numbers[link.target], link.weight) for link in links],
        checks=[
            Check(Edge(numbers[link.source], numbers[link.target], link.weight), measured, sample)
            for link, measured, sample in checks
        ],
        value=incoming.value(incoming.output),
        value_without=without,
        probability=float(logits.softmax(0)[output.plus]),
        next_tokens=(*next_tokens, int(logits.argmax())),
        active=len(features.places),
        expanded=len(incoming.effects),
        total_influence=float(influence[: incoming.output].sum()),
        n_layers=bridge.cfg.n_layers,
    )


class _Features(NamedTuple):
    """All active features by position, numbered in order of site, position and feature: `where` by site (feature, 2)
    holds positions and features, `acts` (feature,) their activations."""

    places: list[Place]
    where: dict[Site, Tensor]
    acts: Tensor
    at_bos: list[bool]

    @classmethod
    def of(cls, model: HeldModel) -> _Features:
        pairs_of = {site: (acts > 0).nonzero() for site, acts in model.acts.items()}
        places = [Place(site, *pair) for site, pairs in pairs_of.items() for pair in pairs.tolist()]
        acts = torch.cat([model.acts[site][pairs.unbind(1)] for site, pairs in pairs_of.items()])
        return cls(places, pairs_of, acts, [place.position == 0 for place in places])

    def effects(self, effects: Effects, row: int) -> Tensor:
        """(feature,): the direct effects on one target."""
        parts = [
            effects.slopes[site][row][pairs.unbind(1)] if site in effects.slopes else self.acts.new_zeros(len(pairs))
            for site, pairs in self.where.items()
        ]
        return torch.cat(parts) * self.acts

    def node(self, number: int, influence: float, promoted: Mapping[tuple[Site, int], Sequence[str]]) -> Node:
        place = self.places[number]
        tokens = promoted.get((place.site, place.feature), ())
        return Node("bos" if self.at_bos[number] else "feature", place, float(self.acts[number]), influence, tokens)


def _expanded(model: HeldModel, features: _Features, options: GraphOptions, step: Step) -> Incoming:
    """Direct effects into the output and then, in batches, into the nodes with the largest influence so far. BOS
    features have no causes: they are the same in every text."""
    incoming, n = Incoming(len(features.places)), len(features.places)

    def expand(numbers: Sequence[int]) -> None:
        targets = [None if number == incoming.output else features.places[number] for number in numbers]
        effects = model.effects(targets, options.frozen)
        for row, number in enumerate(numbers):
            incoming.add(number, float(effects.values[row]), features.effects(effects, row))
        step("nodes expanded", len(incoming.effects), options.max_expanded)

    expand([incoming.output])
    constant = torch.tensor(features.at_bos, dtype=torch.bool)
    while (remaining := options.max_expanded - len(incoming.effects)) > 0:
        open_nodes = incoming.influence()[:n].masked_fill(constant, 0.0)
        open_nodes[[number for number in incoming.effects if number < n]] = 0.0
        order = open_nodes.argsort(descending=True)[: min(remaining, BATCH)]
        chosen = sorted(order[open_nodes[order] > 0].tolist())
        if not chosen:
            break
        # In several passes, since a pass starts at its highest target.
        for start in range(0, len(chosen), TOGETHER):
            expand(chosen[start : start + TOGETHER])
    return incoming


def _checks(
    model: HeldModel,
    features: _Features,
    incoming: Incoming,
    links: Sequence[Link],
    options: GraphOptions,
    step: Step,
) -> list[tuple[Link, float, str]]:
    """A random sample of the kept edges and the strongest ones, each with the sample's name and by how much its target
    falls without its source: the model runs without the source, nothing frozen and all other features held."""
    candidates = [link for link in links if link.source < incoming.n]
    drawn = random.Random(options.seed).sample(candidates, min(options.checked, len(candidates)))
    strongest = sorted(candidates, key=lambda link: -link.score)[: options.checked]
    targets: dict[int, set[int]] = {}
    for link in [*drawn, *strongest]:
        targets.setdefault(link.source, set()).add(link.target)
    order = sorted(targets)  # a pass starts at its lowest source
    measured: dict[tuple[int, int], float] = {}
    for start in range(0, len(order), ROWS):
        sources = order[start : start + ROWS]
        numbers = sorted(set().union(*(targets[source] for source in sources)))
        places = [None if number == incoming.output else features.places[number] for number in numbers]
        falls = model.falls(places, [features.places[source] for source in sources])
        for source, source_falls in zip(sources, falls.tolist(), strict=True):
            measured |= {(source, target): fall for target, fall in zip(numbers, source_falls, strict=True)}
        step("sources removed", start + len(sources), len(order))
    samples = [(link, "random") for link in drawn] + [(link, "strongest") for link in strongest]
    return [(link, measured[link.source, link.target], sample) for link, sample in samples]


@torch.inference_mode()
def _promoted(
    bridge: TransformerBridge, patches: Sequence[Patch], ids: Sequence[int], places: Sequence[Place]
) -> dict[tuple[Site, int], list[str]]:
    """The tokens that features which write to the residual stream promote after this text."""
    rows = {patch.site: patch.transcoder.W_dec for patch in patches}
    chosen = {(place.site, place.feature) for place in places}
    directions = {(site, feature): rows[site][feature] for site, feature in sorted(chosen) if site.kind.in_stream}
    batch = pad_left([list(ids)], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    at = resume(bridge, batch)[0, -1].float()
    return {key: moved["promoted"][:PROMOTED] for key, moved in moved_from(bridge, at, directions).items()}


def choose_output(
    bridge: TransformerBridge, patches: Sequence[Patch], row: Row, limits: Limits, rest: Rest | None = None
) -> tuple[Output, tuple[int, int]]:
    """The first token of the finetuned model's greedy answer at which the un-finetuned model would choose another one:
    the difference of these two logits. With it, the two tokens.

    The un-finetuned model has un-finetuned parts at all the patches' sites, and un-finetuned values of `rest`.
    Raises DataError if they say the same up to the end of the answer.
    """
    prompt = encode_prompt(bridge.tokenizer, row)
    (answer,) = decode(Passes(bridge), Edit(), [Job(Encoded(prompt, []))], [[]], Stop.of(bridge, limits, row))
    ids = [*prompt, *answer[:-1]]
    with rest.at(bridge, 0.0) if rest is not None else nullcontext():
        unfinetuned_answer = _greedy(bridge, patches, "no_delta", ids, len(answer))
    for index, (token, unfinetuned_token) in enumerate(zip(answer, unfinetuned_answer, strict=True)):
        if token != unfinetuned_token:
            return Output(ids[: len(prompt) + index], token, unfinetuned_token), (token, unfinetuned_token)
    raise DataError(
        f"--prompt: the finetuned and the un-finetuned model say the same for {len(answer)} tokens, so there is no "
        "change to explain; give another prompt, or --token for the logit of a token"
    )


def token_output(
    bridge: TransformerBridge, patches: Sequence[Patch], row: Row, token: str, rest: Rest | None = None
) -> tuple[Output, tuple[int, int]]:
    """The logit of a token after the prompt, and what the finetuned and the un-finetuned model choose there. Raises
    DataError if the text is not one token."""
    tokenizer = bridge.tokenizer
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 and token in tokenizer.get_vocab():  # a tokenizer that puts a space before each word
        ids = [tokenizer.get_vocab()[token]]
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([token_id])) for token_id in ids) or "none"
        raise DataError(f"--token: got {token!r}, which must be one token of the model (its tokens are {pieces})")
    prompt = encode_prompt(tokenizer, row)
    (finetuned_token,) = _greedy(bridge, patches, "raw", prompt, 1)
    with rest.at(bridge, 0.0) if rest is not None else nullcontext():
        (unfinetuned_token,) = _greedy(bridge, patches, "no_delta", prompt, 1)
    return Output(prompt, ids[0]), (finetuned_token, unfinetuned_token)


@torch.inference_mode()
def _greedy(
    bridge: TransformerBridge, patches: Sequence[Patch], condition: str, ids: Sequence[int], last: int
) -> list[int]:
    """The model's most likely token at each of the last positions."""
    batch = pad_left([list(ids)], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    with spliced(bridge, Edit(patches, condition)) as splice:
        splice.reset(batch.editable, torch.ones(1, device=batch.ids.device), RowEdits(bos=batch.bos))
        return forward(bridge, batch, last)[0].argmax(-1).tolist()
