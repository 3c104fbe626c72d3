"""What a chat template reads: variables of a conversation, such as `tools`, and keys of its messages.

In: the source of a Jinja template, which is parsed and not run. Out: names.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""The marks around what an assistant writes; an extension of transformers, so Jinja alone cannot parse them."""


class Reads(NamedTuple):
    """The variables that a template does not set itself, and all names that it may look up in a message."""

    variables: frozenset[str]
    keys: frozenset[str]


@lru_cache(maxsize=8)
def reads(template: str) -> Reads:
    """What `template` reads; nothing if it cannot be parsed, which rendering it will report."""
    from jinja2 import Environment, TemplateError, meta, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateError:
        return Reads(frozenset(), frozenset())
    keys = {node.attr for node in tree.find_all(nodes.Getattr)}
    keys |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return Reads(frozenset(meta.find_undeclared_variables(tree)), frozenset(keys))
