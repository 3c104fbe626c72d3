"""Groups of features that fire on the same tokens, whatever their layer and kind of site.

In: a model's passes, patches, held-out rows, and each feature's estimated effect. Out: the groups, those with the
largest effects first: their features, the tokens they fire on, and the tokens they promote.

The cosine similarity of two features' activations over the rows' tokens is clustered (average linkage). One half of the
rows chooses where the tree is cut, by the silhouette (Rousseeuw 1987); the other half says how well the groups hold on
rows that had no part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from data.rows import Row
from evaluators.measures.features import Text, moved_tokens, only_at_bos, read_texts, strongest_contexts
from evaluators.measures.single_features import Feature
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import Passes

MOST_GROUPS, FEWEST_FEATURES = 30, 8
"""Maximum number of groups, and minimum number of features in one; other features stay single."""
CUTS = tuple(round(0.3 + 0.05 * step, 2) for step in range(11))
"""Candidate cuts: average similarities below which two clusters are not merged."""
FEWEST_TOKENS = 3
"""Tokens of the first half on which a feature must fire to be clustered."""
MOST_CLUSTERED = 8192
"""Features in the tree, those that write most; memory grows with the square. Others join the group they resemble."""
SINGLE = -1
FIRES_ON, CONTEXTS = 8, 5
"""Tokens and contexts stored per group."""
Acts = NDArray[np.float32]
"""(feature, token): activations, or these divided by their norm."""


class Partition(NamedTuple):
    """`labels` (feature,): each feature's group, `SINGLE` for none. `cut` is the similarity where the tree was cut."""

    labels: NDArray[np.int64]
    cut: float
    silhouette: float


@torch.inference_mode()
def find_groups(
    passes: Passes, patches: Sequence[Patch], rows: Sequence[Row], effects: Mapping[Feature, float]
) -> dict[str, Any]:
    """`groups`: a dict for each group, the largest sum of estimated effects first, with its `features` (most effective
    first), its summed `effect`, `fires_on` (tokens, each with its share of the group's activation), `contexts` and the
    tokens `promoted` and `suppressed` by what its features write to the residual stream. `singles`: the features that
    fire but belong to no group.

    `silhouette` has the mean over all clustered features, single ones counting as 0: `chosen` on the half of the rows
    that chose the `cut`, `held_out` on the other half, and `permuted` there after the groups' features were exchanged
    at random. A feature that is active only at BOS belongs to no group: all of these fire on the same token.
    """
    texts = list(read_texts(passes, patches, rows))
    texts.sort(key=lambda text: text.row.label)  # every other text of each label, so that the halves have all labels
    all_features = [(patch.site, number) for patch in patches for number in range(patch.transcoder.d_sae)]
    acts = np.concatenate([_activations(patches, text) for text in texts], axis=1)
    first_half = np.concatenate([np.full(len(text.ids), index % 2 == 0) for index, text in enumerate(texts)])
    at_bos = torch.cat([only_at_bos(patch) for patch in patches]).numpy()
    live = np.flatnonzero(((acts[:, first_half] > 0).sum(1) >= FEWEST_TOKENS) & ~at_bos)
    sizes = torch.cat([patch.transcoder.W_dec.float().norm(dim=1).cpu() for patch in patches]).numpy()
    written = (np.square(acts[live]).mean(1) ** 0.5 * sizes[live]) / _per_site(patches, live, acts, sizes)
    chosen = np.sort(live[np.argsort(-written, kind="stable")[:MOST_CLUSTERED]])
    half_acts, other_acts = (unit(acts[chosen][:, half]) for half in (first_half, ~first_half))
    partition = cluster(half_acts)
    permuted = np.random.default_rng(0).permutation(partition.labels)
    joined = _joined(acts, first_half, live, chosen, partition)
    names = np.unique(joined[joined != SINGLE])
    groups = [[all_features[index] for index in live[joined == name]] for name in names]
    for group in groups:
        group.sort(key=lambda feature: (-effects.get(feature, 0.0), feature))
    order = sorted(range(len(groups)), key=lambda index: -sum(effects.get(feature, 0.0) for feature in groups[index]))
    return {
        "n_rows": len(rows),
        "n_live": len(live),
        "n_clustered": len(chosen),
        "cut": partition.cut,
        "silhouette": {
            "chosen": partition.silhouette,
            "held_out": silhouette(other_acts, partition.labels),
            "permuted": silhouette(other_acts, permuted),
        },
        "groups": [
            {
                "effect": sum(effects.get(feature, 0.0) for feature in groups[index]),
                "features": groups[index],
                **_described(passes, patches, texts, acts, live[joined == names[index]], all_features),
            }
            for index in order
        ],
        "singles": [all_features[index] for index in live[joined == SINGLE]],
    }


def cluster(acts: Acts) -> Partition:
    """Groups of features by their unit activations (feature, token): of the `CUTS` the one with the best silhouette."""
    no_groups = Partition(np.full(len(acts), SINGLE), 0.0, 0.0)
    if len(acts) < 2 * FEWEST_FEATURES:
        return no_groups
    tree = linkage(_distances(acts), "average")
    best = no_groups
    for cut in CUTS:
        labels = _largest(fcluster(tree, 1 - cut, "distance"))
        quality = silhouette(acts, labels)
        if quality > best.silhouette:
            best = Partition(labels, cut, quality)
    return best


def silhouette(acts: Acts, labels: NDArray[np.int64]) -> float:
    """The mean of (b - a) / max(a, b) over features: a is a feature's mean distance (1 - cosine) from the others of its
    group, b its smallest mean distance from another group. Features without a group count as 0; with fewer than two
    groups all do."""
    names, counts = np.unique(labels[labels != SINGLE], return_counts=True)
    if len(names) < 2:
        return 0.0
    sums = np.stack([acts[labels == name].sum(0) for name in names])
    similar = acts @ sums.T  # (feature, group): the sum of cosines with the group's features
    inside = np.searchsorted(names, labels[labels != SINGLE])
    members = similar[labels != SINGLE]
    index = np.arange(len(members))
    self_similarity = np.square(acts[labels != SINGLE]).sum(1)  # 1, or 0 if the feature is silent on these tokens
    a = 1 - (members[index, inside] - self_similarity) / np.maximum(counts[inside] - 1, 1)
    distances = 1 - members / counts
    distances[index, inside] = np.inf
    b = distances.min(1)
    return float(((b - a) / np.maximum(np.maximum(b, a), 1e-12)).sum() / len(acts))


def unit(acts: Acts) -> Acts:
    """Each feature's activations divided by their norm; zero where it never fires."""
    return acts / np.maximum(np.linalg.norm(acts, axis=1, keepdims=True), 1e-12)


def _distances(acts: Acts) -> NDArray[np.float64]:
    """1 - cosine for each pair of features, as scipy orders them; row by row, to hold no square matrix."""
    n = len(acts)
    condensed, done = np.empty(n * (n - 1) // 2), 0
    for index in range(n - 1):
        count = n - 1 - index
        condensed[done : done + count] = 1 - acts[index + 1 :] @ acts[index]
        done += count
    return np.clip(condensed, 0.0, None, out=condensed)


def _largest(clusters: NDArray[np.int32]) -> NDArray[np.int64]:
    """The labels of the largest clusters, at most `MOST_GROUPS`; features of other clusters are single."""
    sizes = Counter(clusters.tolist())
    largest = [name for name, size in sizes.most_common(MOST_GROUPS) if size >= FEWEST_FEATURES]
    return np.where(np.isin(clusters, largest), clusters, SINGLE).astype(np.int64)


def _joined(
    acts: Acts, half: NDArray[np.bool_], live: NDArray[np.intp], chosen: NDArray[np.intp], partition: Partition
) -> NDArray[np.int64]:
    """The label of every live feature: one outside the tree joins the group to whose features it is most similar, if
    the mean similarity reaches the cut."""
    labels = np.full(len(live), SINGLE)
    inside = np.isin(live, chosen)
    labels[inside] = partition.labels
    names = np.unique(partition.labels[partition.labels != SINGLE])
    if len(names) and not inside.all():
        members = unit(acts[chosen][:, half])
        means = np.stack([members[partition.labels == name].mean(0) for name in names])
        similar = unit(acts[live[~inside]][:, half]) @ means.T
        labels[~inside] = np.where(similar.max(1) >= partition.cut, names[similar.argmax(1)], SINGLE)
    return labels


def _activations(patches: Sequence[Patch], text: Text) -> Acts:
    """(feature, token): of all patches' features, in order."""
    return torch.cat([text.acts[patch.site].float().cpu() for patch in patches], dim=1).T.numpy()


def _per_site(patches: Sequence[Patch], live: NDArray[np.intp], acts: Acts, sizes: NDArray[np.float32]) -> Acts:
    """For each live feature the size of what its site's delta writes, as sites differ in scale."""
    first, totals = 0, []
    for patch in patches:
        features = slice(first, first + patch.transcoder.d_sae)
        total = float((np.square(acts[features]).mean(1) * np.square(sizes[features])).sum()) ** 0.5
        totals.append(np.full(patch.transcoder.d_sae, max(total, 1e-12), dtype=np.float32))
        first = features.stop
    return np.concatenate(totals)[live]


def _described(
    passes: Passes,
    patches: Sequence[Patch],
    texts: Sequence[Text],
    acts: Acts,
    members: NDArray[np.intp],
    all_features: Sequence[Feature],
) -> dict[str, Any]:
    """What a group fires on and promotes. Its activation is the mean of its features' unit activations."""
    pattern = unit(acts[members]).mean(0)
    by_text = [torch.from_numpy(part) for part in np.split(pattern, np.cumsum([len(text.ids) for text in texts])[:-1])]
    totals: Counter[int] = Counter()
    for text, text_acts in zip(texts, by_text, strict=True):
        for token, strength in zip(text.ids, text_acts.tolist(), strict=True):
            totals[token] += strength
    tokenizer: Any = passes.bridge.tokenizer
    fires_on = [
        [tokenizer.decode([token]), round(share / totals.total(), 4)] for token, share in totals.most_common(FIRES_ON)
    ]
    peak = max(float(pattern.max()), 1e-12)
    return {
        "fires_on": fires_on,
        "contexts": [
            context for context, _ in strongest_contexts(tokenizer, texts, [part / peak for part in by_text], CONTEXTS)
        ],
        **_promoted(passes, patches, texts, acts, members, all_features),
    }


def _promoted(
    passes: Passes,
    patches: Sequence[Patch],
    texts: Sequence[Text],
    acts: Acts,
    members: NDArray[np.intp],
    all_features: Sequence[Feature],
) -> dict[str, list[str]]:
    """The tokens moved by what the group's features write to the residual stream, summed at their mean activations."""
    by_site = {patch.site: patch for patch in patches}
    written: Tensor | None = None
    for index in members:
        site, number = all_features[index]
        if site.kind.in_stream:
            row = by_site[site].transcoder.W_dec[number].float() * float(acts[index].mean())
            written = row if written is None else written + row
    if written is None:
        return {"promoted": [], "suppressed": []}
    return moved_tokens(passes.bridge, texts, {"group": written})["group"]
