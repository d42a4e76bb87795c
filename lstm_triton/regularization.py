"""The options of regularised steps as the user gives them: checked, and made the rules of a call.

The equations are in `lstm_triton_kernels.regularize`.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lstm_triton_kernels.regularize import Rules
from torch import Tensor

DroppedOn = Literal["hidden", "candidate"]
DROPPED_ON: tuple[DroppedOn, ...] = get_args(DroppedOn)

Zoneout = tuple[float, float]
"""The probabilities of keeping an element of h and one of c."""


def rules_of(
    recurrent_dropout: float, recurrent_dropout_on: DroppedOn, zoneout: Zoneout, cell_clip: float | None,
    proj_clip: float | None, proj_size: int, training: bool,
) -> Rules:  # fmt: skip
    """Return the rules of a call with these options, those of `lstm_triton.LSTM`: without dropout if not `training`.

    Raises TypeError or ValueError for a value that is none.
    """
    options = (recurrent_dropout, recurrent_dropout_on, zoneout, cell_clip, proj_clip, proj_size > 0, training)
    if torch.compiler.is_compiling():
        return _rules(*options)
    try:
        return _known_rules(*options)
    except TypeError:  # an option cannot be hashed: a list, or what is refused
        return _rules(*options)


def _rules(
    recurrent_dropout: Any, recurrent_dropout_on: Any, zoneout: Any, cell_clip: Any, proj_clip: Any, projected: bool,
    training: bool,
) -> Rules:  # fmt: skip
    dropout = probability("recurrent_dropout", recurrent_dropout)
    if recurrent_dropout_on not in DROPPED_ON:
        raise ValueError(f"recurrent_dropout_on must be 'hidden' or 'candidate', got {recurrent_dropout_on!r}")
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
        raise ValueError(f"zoneout must be two probabilities, of h and of c, got {zoneout!r}")
    rates = [probability("zoneout", rate) for rate in zoneout]
    limits = [limit("cell_clip", cell_clip), limit("proj_clip", proj_clip)]
    if proj_clip is not None and not projected:
        raise ValueError("proj_clip limits a projected hidden state: it needs proj_size")
    on_hidden = recurrent_dropout_on == "hidden"
    found = Rules.rounded(dropout * on_hidden, dropout * (not on_hidden), *rates, *limits)
    return found if training else found.evaluated()


_known_rules = lru_cache(maxsize=1024, typed=True)(_rules)


def probability(name: str, value: Any) -> float:
    """Return the value as a number, if it is a probability. Raises ValueError if not."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
    return float(value)


def limit(name: str, value: Any) -> float:
    """Return a limit as a number, 0 for None. Raises ValueError unless it is positive."""
    if value is None:
        return 0.0
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ValueError(f"{name} should be a positive number or None, got {value!r}")
    return float(value)


def asked(rules: Rules, layer_norm: bool = False) -> tuple[str, ...]:
    """Return the options that `torch.nn.LSTM`'s operator does not have, by name, of those that have an effect."""
    given = dict(
        recurrent_dropout=rules.hidden_dropout or rules.candidate_dropout,
        zoneout=rules.zoneout_h or rules.zoneout_c,
        cell_clip=rules.cell_clip,
        proj_clip=rules.proj_clip,
        layer_norm=layer_norm,
    )
    return tuple(name for name, value in given.items() if value)


def seed_for(rules: Rules, training: bool, device: torch.device) -> Tensor | None:
    """Return the seed (1,) of the masks of a layer, drawn from the device's generator; None where none are drawn.

    On a GPU it stays there: nothing waits for it, and a captured graph draws another one at each replay.
    """
    if not training or not rules.random:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def drop_weights(weights: Sequence[Tensor], names: Sequence[str], rate: float) -> Sequence[Tensor]:
    """Return the weights with dropout on every W_hh (Merity et al. 2018); names: of one direction's parameters."""
    place = names.index("weight_hh")
    return [F.dropout(w, rate) if n % len(names) == place else w for n, w in enumerate(weights)]
