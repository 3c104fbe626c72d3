"""What finetuning changed, as far as a sweep needs to know before it trains anything on it.

In: a `Context` and the comparison of its two models. Out: `pair.json`: the parameters that differ, the sites that hold
them, the rest, and the rounded copy of the un-finetuned model if one is needed. A site that did not change gets no
change deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import keys
from jobs.context.context import Context
from jobs.context.fingerprints import hash_of
from jobs.context.workspace import PAIR, VALIDATION_FILE
from jobs.errors import DamagedFileError, RequestError
from jobs.files import is_finished, read_json, short_hash, write_json
from models.errors import ModelError
from models.gguf_files import PACKAGED
from models.sources import TINY
from sites import ATTENTION_OUT, KINDS, Site

if TYPE_CHECKING:
    from models.adopted import Pair


def examine(context: Context, keep: bool = True) -> None:
    """Examines a pair that was made elsewhere, unless that has been done, and prints what is unusual or left out. What
    is found is written down unless `keep` is False: it says of what pair the sweep's results are.

    Raises ModelError or RequestError if the two are not a pair, or if nothing that the settings ask for has changed.
    """
    from models.adopted import check_pair

    facts, adopted = context.pair, context.adopted
    assert adopted is not None
    if facts is None or (facts["rounded"] and not Path(facts["rounded"]).is_dir()):
        # Hashes for the keys of results are computed now, as the files are being read anyway.
        hash_file = partial(hash_of, models=context.space.models)
        pair = check_pair(
            context.source,
            adopted,
            context.settings.model.source,
            hash_file,
            finetuned_source=context.settings.model.finetuned or "",
        )
        rounded = rounded_copy(context, pair) if pair.rounded else ""
        merged = [] if adopted == context.finetuned else _changed_by_merging(context)
        exact = adopted == context.finetuned or bool(merged)
        facts = note(context, merged or pair.changed, notes=pair.notes, rounded=rounded, exact=exact, keep=keep)
    for text in facts["notes"]:
        context.progress.line(f"note: {text}")
    say_what_changed(context)


def has_finetuned(context: Context) -> bool:
    """Whether the finetuned model is there and was checked; not if its manifest is damaged, which is mended later."""
    try:
        return is_finished(context.space.lora, keys.finetuned_check(context.settings))
    except DamagedFileError:
        return False


def examine_base(context: Context) -> None:
    """Examines a user's own un-finetuned model, unless the finetuned one exists already. Raises ModelError if it cannot
    be loaded properly."""
    from models.adopted import check_base
    from models.weights import load_config

    source = context.settings.model.source
    is_shipped = source in PACKAGED or source == TINY
    if not is_shipped and not has_finetuned(context):
        check_base(context.source, partial(hash_of, models=context.space.models))
        _check_known(context, load_config(context.source))


def _check_known(context: Context, config: Any) -> None:
    from models.blocks import part_places

    if not part_places(config, Site(0, ATTENTION_OUT)):
        raise ModelError(
            f"model.source: TransformerLens does not know the architecture {config.model_type} of "
            f"{context.settings.model.source}, so nothing can be spliced into it"
        )


def note(
    context: Context,
    changed: Sequence[str],
    *,
    exact: bool,
    notes: Sequence[str] = (),
    rounded: str = "",
    keep: bool = True,
) -> dict[str, Any]:
    """What is known about the finetuned model: the parameters that changed or, for an adapter that is not merged yet
    (not `exact`), the modules that it adapts. Written to the sweep's folder, or if not `keep` for this context only."""
    from models.blocks import linear_kinds, sites_with
    from models.comparison import in_words
    from models.weights import load_config

    config = load_config(context.source)
    _check_known(context, config)
    sites, rest = sites_with(config, changed)
    facts = {
        "key": context.pair_key,
        "exact": exact,
        "changed": sorted(changed),
        "in_words": in_words(changed, config.num_hidden_layers),
        "sites": [site.key for site in sites],
        "rest": sorted(rest),
        "linear": [kind.name for kind in linear_kinds(config)],
        "notes": list(notes),
        "rounded": rounded,
    }
    if keep:
        write_json(context.space.folder / PAIR, facts)
        context.forget_pair()
    else:
        context.pair = facts
    return facts


def _changed_by_merging(context: Context) -> list[str]:
    """The parameters that merging changed, if an adapter with this content was merged before. Its files may only have
    been copied or touched since, and layers that it left untrained must stay excluded."""
    if not is_finished(context.space.lora, keys.finetuned_check(context.settings)):
        return []
    return (read_json(context.space.lora / VALIDATION_FILE) or {}).get("changed", [])


def say_what_changed(context: Context) -> None:
    """Prints what finetuning changed and which layers are left out. Raises RequestError if the requested change deltas
    have nothing to explain."""
    pair = context.pair
    assert pair is not None
    source = context.settings.model.finetuned or "the finetuned model"
    subject = "finetuning changed" if pair["exact"] else "the adapter adapts"
    kinds = context.kinds if "change" in context.settings.deltas.targets else []
    deltas = f"; deltas for {', '.join(kind.name for kind in kinds)}" if kinds else ""
    context.progress.line(f"  {subject} {pair['in_words'] or 'nothing'}{deltas}")
    if "change" not in context.settings.deltas.targets:
        return
    from models.architectures import WITHOUT_MLP
    from models.comparison import layer_list
    from models.sources import model_facts

    if why := WITHOUT_MLP.get(model_facts(context.source)["architecture"]):
        context.progress.line(f"  no deltas of MLPs: {why}; what changed in them goes with the rest")

    if not context.sites_of("change"):
        section = context.settings.deltas
        place = "in any layer" if section.layers == "all" else f"in {layer_list(section.layers)}"
        requested = KINDS if section.sites == "auto" else section.sites
        raise RequestError(
            f"{'model.finetuned' if context.settings.model.finetuned else 'lora.space.targets'}: {source} changed "
            f"{pair['in_words'] or 'nothing'}, but none of {', '.join(KINDS[name].words for name in requested)} "
            f"{place}, so there is nothing for change deltas to explain (deltas.sites and deltas.layers say where they "
            "look)"
        )
    for kind in kinds:
        if left_out := [site.layer for site in context.unchanged if site.kind == kind]:
            context.progress.line(f"  {kind.words} of {layer_list(left_out)} did not change: no change deltas there")


def rounded_copy(context: Context, pair: Pair) -> str:
    """Writes the un-finetuned model in the finetuned one's dtype; returns its folder."""
    from models.comparison import write_rounded
    from models.weights import open_weights

    name = Path(context.settings.model.source).name
    identity = short_hash(keys.model_files(context.settings), pair.rounded)
    context.space.models.mkdir(parents=True, exist_ok=True)
    folder = context.space.models / f"{name}-rounded-{identity}"
    return str(write_rounded(open_weights(context.source), pair.rounded, folder))
