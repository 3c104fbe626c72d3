"""Names of sites, of sets of sites and of deltas: what is formatted reads back, and finished sweeps stay readable."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sites import (
    KINDS,
    MLP,
    READINGS,
    Address,
    Ground,
    SetAddress,
    Site,
    is_set,
    kind_of_taps,
    label_order,
    mlp_sites,
    parse_sites,
    sets_of,
    sites_label,
)

OTHER = replace(MLP, order=0, name="other", reads="hook_in", writes=("hook_a", "hook_b"))
"""A kind of another name, so that names are tried with more than one."""


@pytest.fixture(autouse=True, scope="module")
def _another_kind():
    KINDS[OTHER.name] = OTHER
    yield
    del KINDS[OTHER.name]


places = st.builds(Site, st.integers(0, 199), st.sampled_from([MLP, OTHER]))
sets = st.sets(places, max_size=40).map(sorted)
grounds = st.one_of(
    st.just(Ground("change")),
    st.just(Ground("residual")),
    st.integers(0, 100).map(lambda hundredths: Ground("residual", hundredths / 100)),
)
widths = st.integers(0, 20_000)


@given(places)
def test_sites_read_back(site):
    assert Site.parse(site.label) == Site.parse(site.folder) == site


@given(sets)
def test_sets_read_back(sites):
    assert parse_sites(sites_label(sites)) == parse_sites(sites_label(sites, digits=2)) == sites
    assert is_set(sites_label(sites)) == (len(sites) > 1)


@given(places, grounds, widths)
def test_addresses_read_back(site, ground, d_new):
    address = Address(site, ground, d_new)
    assert Address.parse(address.folder) == address
    assert SetAddress.parse(address.name) == SetAddress((site,), ground, d_new)


@given(sets.filter(bool), grounds, widths)
def test_addresses_of_sets_read_back(sites, ground, d_new):
    address = SetAddress(tuple(sites), ground, d_new)
    assert SetAddress.parse(address.name) == address


@pytest.mark.parametrize("kind", dict.fromkeys([*KINDS.values(), *READINGS.values(), OTHER]))
def test_kinds_are_found_by_their_taps(kind):
    assert kind_of_taps(kind.taps) == kind
    with pytest.raises(ValueError, match=re.escape(kind.reading)):
        kind_of_taps([kind.reading, "hook_elsewhere"])


def test_names_of_finished_sweeps():
    """As they lie on people's disks."""
    assert Site(8).label == "8"
    assert Site(8).folder == "layer_08"
    assert Site(8, OTHER).folder == "layer_08.other"
    assert Site(8).reads == "blocks.8.ln2.hook_normalized"
    assert Address(Site(8), Ground("residual", 0.25), 32).folder == "layer_08/p0.25/d032"
    assert Address(Site(8), Ground("residual"), 4).name == "layer_08_l0_d004"
    assert SetAddress(tuple(mlp_sites(range(30))), Ground("change"), 128).name == "layer_00-29_change_d128"


@pytest.mark.parametrize("text", ["", "x", "8.nothing", "layer_", "-1", "1-2"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="site"):
        Site.parse(text)
    with pytest.raises(ValueError, match="name"):
        Address.parse(f"layer_{text}/change/0")


def test_names_stand_for_sets():
    sites = mlp_sites(range(7))

    def layers(name, among):
        return [tuple(site.layer for site in chosen) for chosen in sets_of(name, among)]

    assert layers("all", sites) == [tuple(range(7))]
    assert layers("each", mlp_sites([3, 5])) == [(3,), (5,)]
    assert layers("thirds", sites) == [(0, 1), (2, 3, 4), (5, 6)]
    assert sorted(sum(layers("thirds", mlp_sites(range(30))), ())) == list(range(30))
    assert sets_of("thirds", mlp_sites([1, 2])) == []
    assert layers([5, 2], sites) == [(2, 5)]
    assert sets_of([5, 9], sites) == [], "a set that the deltas do not cover"
    assert sets_of("all", []) == []
    both = sorted([*mlp_sites(range(3)), *mlp_sites(range(3), OTHER)])
    assert sets_of([1], both) == [(Site(1, OTHER), Site(1))], "in the order of the forward pass"


@pytest.mark.parametrize(
    ("layers", "label"),
    [([8], "8"), ([16, 8], "8+16"), ([0, 1, 2, 3, 7], "0-3+7"), ([1, 2], "1+2"), (range(100), "0-99"), ([], "none")],
)
def test_labels_of_mlps(layers, label):
    assert sites_label(mlp_sites(layers)) == label


def test_labels_of_several_kinds_and_their_order():
    assert sites_label([*mlp_sites(range(3)), *mlp_sites([0, 2], OTHER)]) == "0-2+0.other+2.other"
    assert sites_label(mlp_sites([3, 4, 5]), digits=2) == "03-05"
    labels = ["0-29", "8+16", "20", "none", "8"]
    assert sorted(labels, key=label_order) == ["none", "8", "20", "8+16", "0-29"]
