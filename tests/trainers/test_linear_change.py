"""The change of a projection: made of x and weights, it is what both models' own modules give."""

import shutil
from pathlib import Path

import pytest
import torch

from models.blocks import linear_kinds, read_paths
from models.weights import load_config
from sites import ATTENTION_OUT, KINDS, QKV, Site
from trainers.activations import read_pairs
from trainers.capture import Columns, Plan, capture
from trainers.checked_files import save
from trainers.delta_data import change_map, change_pairs, change_unit, map_file, mean_square, read_change
from trainers.errors import TrainingError

ROWS = [[2, *range(start, start + 30)] for start in range(20, 200, 12)]


@pytest.fixture(scope="module")
def before(model_folder, altered, tmp_path_factory):
    """Other projections: those of keys as they are, those of queries changed twice as much as those of values."""
    first, both = (tmp_path_factory.mktemp(name) for name in ("first", "both"))
    return altered(altered(model_folder, first, "q_proj", "o_proj"), both, "v_proj", much=0.2)


@pytest.fixture(scope="module")
def captured(model_folder, before, wrapped, tmp_path_factory):
    """The same sites once with the change of every token, and once with x alone and the maps."""
    bridge, folders = wrapped(model_folder), [tmp_path_factory.mktemp(name) for name in ("whole", "mapped")]
    kinds = linear_kinds(load_config(model_folder))
    sites = [Site(1, kind) for kind in kinds]
    theirs, ours = (read_paths(bridge, folder, sites, torch.float32) for folder in (before, model_folder))
    for split in ("train", "validation"):
        plan = Plan.make(ROWS if split == "train" else ROWS[:5], seed=1)
        capture(bridge, plan, {site: Columns(False, theirs[site]) for site in sites}, folders[0] / split)
        capture(bridge, plan, {site: Columns(False, sums=True) for site in sites}, folders[1] / split)
    for site in sites:
        save(map_file(folders[1], site), change_map(theirs[site], ours[site]))
    return *folders, sites


def test_a_norm_after_the_projection_makes_it_no_linear_kind(model_folder):
    config = load_config(model_folder)
    assert linear_kinds(config) == ([QKV] if config.model_type == "gemma2" else [QKV, ATTENTION_OUT])


def test_the_change_made_of_weights_is_the_one_that_both_models_give(captured):
    whole, mapped, sites = captured
    for site in sites:
        assert not map_file(whole, site).is_file()
        ours, theirs = (change_pairs(one, "train", site).whole() for one in (mapped, whole))
        assert torch.equal(ours[0], theirs[0])
        expected = theirs[1].float()
        torch.testing.assert_close(ours[1].float(), expected, rtol=0.02, atol=5e-3 * expected.abs().max().item())
        assert change_unit(mapped, site) == pytest.approx(change_unit(whole, site), rel=1e-2)


def test_x_is_all_that_is_stored_of_a_token(captured):
    _, mapped, sites = captured
    for site in sites:
        folder: Path = mapped / "train" / site.folder
        with pytest.raises(Exception, match="change"):
            read_pairs(folder, ("x", "change"))


def test_each_part_counts_in_units_of_its_own_change(captured):
    """Queries, keys and values: what did not change keeps its unit, and has nothing to explain."""
    _, mapped, sites = captured
    data = read_change(mapped, next(site for site in sites if site.kind == KINDS["qkv"]))
    assert data.scale is not None
    raw = change_pairs(mapped, "validation", data.site).whole()[1].float()
    scaled = data.validation.whole()[1].float()
    torch.testing.assert_close(scaled * data.scale, raw, rtol=0.02, atol=1e-3 * raw.abs().max().item())
    changed = [part.pow(2).mean().item() for part in scaled.split(_parts(data.scale, raw), dim=1)]
    assert changed[0] == pytest.approx(1.0, rel=0.02)
    assert changed[1] == 0.0
    assert changed[2] == pytest.approx(1.0, rel=0.02)
    assert data.unit == pytest.approx(mean_square(data.validation))
    assert raw.pow(2).mean(0)[: _parts(data.scale, raw)[0]].mean() > 1.5 * raw.pow(2).mean(0)[-1]


def test_a_site_in_which_nothing_changed_is_one_sentence(captured, model_folder, wrapped, tmp_path):
    """A trial records it as its reason."""
    _, mapped, sites = captured
    folder, site = Path(shutil.copytree(mapped, tmp_path / "same")), sites[0]
    (path,) = read_paths(wrapped(model_folder), model_folder, [site], torch.float32).values()
    map_file(folder, site).unlink()
    save(map_file(folder, site), change_map(path, path))
    with pytest.raises(
        TrainingError, match="finetuning did not change what the queries, keys and values of layer 1 comp"
    ):
        read_change(folder, site)


def _parts(scale, raw):
    """The widths of queries, keys and values, by where the unit changes."""
    ends = [place + 1 for place in range(len(scale) - 1) if scale[place] != scale[place + 1]]
    first, second = ends
    return [first, second - first, len(scale) - second]
