"""Places in a model: single sites, their kinds, sets of them, and their names in files, tables and settings.

Pure: no torch, no files. Every other package may import it; it imports none of them.
"""

from sites.addresses import Address, Ground, SetAddress, width_label
from sites.kinds import ATTENTION_OUT, KINDS, MLP, QKV, READINGS, Kind, kind_of_taps
from sites.sets import NOTHING, is_set, label_of_keys, label_order, parse_sites, sets_of, sites_label
from sites.site import Site, mlp_sites

__all__ = [
    "ATTENTION_OUT",
    "KINDS",
    "MLP",
    "NOTHING",
    "QKV",
    "READINGS",
    "Address",
    "Ground",
    "Kind",
    "SetAddress",
    "Site",
    "is_set",
    "kind_of_taps",
    "label_of_keys",
    "label_order",
    "mlp_sites",
    "parse_sites",
    "sets_of",
    "sites_label",
    "width_label",
]
