"""What the tests of sharding rules share."""

import re

from flax import traverse_util


def assert_one_rule_each(rules, shapes):
    """Exactly one rule matches, and names all dimensions or none; whatever is as big as a matrix is
    cut."""
    for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        matching = [axes for pattern, axes in rules if re.search(pattern, name)]
        assert len(matching) == 1, (name, matching)
        assert len(matching[0]) in (0, leaf.ndim), name
        assert any(matching[0]) or leaf.size < 10_000, name
