"""Limits of clipping that no value of a reference comes near.

Where a value is at its limit its gradient is zero. If one is so near that rounding decides, the gradients that follow
are quite other ones, however exactly they are computed: such cases would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from lstm_triton_kernels.regularize import Regularized, Rules, float32
from torch import Tensor

CLIPS = {"cell_clip": "clip_cell", "proj_clip": "clip_hidden"}
"""What a rule of that name calls."""


def clear_of_limits(rules: Rules, forward: Callable[[Rules], Any]) -> Rules:
    """Return the rules with those limits, of some about their own, that the fewest values come near.

    forward: computes a forward pass by `reference` with such rules.
    """
    for name in CLIPS:
        limit = getattr(rules, name)
        if limit:
            near = (rules._replace(**{name: float32(limit * (1 + n / 64))}) for n in range(-12, 24))
            rules = max(near, key=lambda some, name=name: least_distance(name, some, forward))
    return rules


def least_distance(name: str, rules: Rules, forward: Callable[[Rules], Any]) -> float:
    """Return how near an absolute value comes to the limit of a rule, before it is clipped."""
    found, limit, clip = [], getattr(rules, name), getattr(Regularized, CLIPS[name])

    def watched(self: Regularized, x: Tensor) -> Tensor:
        found.append((x.detach().abs() - limit).abs().min().item())
        return clip(self, x)

    with mock.patch.object(Regularized, CLIPS[name], watched):
        forward(rules)
    return min(found)
