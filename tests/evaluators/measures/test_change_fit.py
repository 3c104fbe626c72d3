"""How much finetuning changed an MLP and what a delta leaves of it, against plain hooks on two models."""

import pytest
import torch

from data.encoding import pad_left
from evaluators.measures.change_fit import evaluate_change
from evaluators.splice.interventions import Patch
from models.blocks import read_paths
from sites import mlp_sites


def test_the_sums_are_those_of_plain_hooks(subject, base_folder, plain_taps, random_transcoder):
    paths = read_paths(subject.bridge, base_folder, mlp_sites([0, 2]))
    patches = [
        Patch(site, path, random_transcoder(subject.d_model, 8, site.layer, 9, bias=False))
        for site, path in paths.items()
    ]
    found = evaluate_change(subject.passes, patches, subject.rows)
    for patch, entries in zip(patches, found, strict=True):
        assert [(one["subset"], one["part"]) for one in entries] == [
            (row.label, part) for row in subject.rows for part in ("prompt", "target")
        ]
        for number, row in enumerate(subject.encoded):
            x, y, _ = plain_taps(subject.plain, pad_left([row.ids], 0), patch.site.layer)
            with torch.no_grad():
                change = (y - paths[patch.site](x))[0]
            left = change - patch.delta(x[0])
            parts = (slice(1, len(row.prompt)), slice(len(row.prompt), None))
            for entry, where in zip(entries[2 * number : 2 * number + 2], parts, strict=True):
                assert entry["change"] == pytest.approx(change[where].pow(2).sum().item(), rel=1e-3)
                assert entry["left"] == pytest.approx(left[where].pow(2).sum().item(), rel=1e-3)
                assert entry["n_tokens"] == len(change[where])
    after = read_paths(subject.bridge, subject.folder, mlp_sites([0, 2]))
    exact = evaluate_change(subject.passes, patches, subject.rows, (paths, after))
    for entries, others in zip(found, exact, strict=True):
        for name in ("change", "left"):
            assert [one[name] for one in others] == pytest.approx([one[name] for one in entries], rel=1e-3)


def test_a_base_transcoder_is_no_ground_for_a_change(subject):
    with pytest.raises(ValueError, match="a change is read where the ground is a path"):
        evaluate_change(subject.passes, subject.patch, subject.rows)
