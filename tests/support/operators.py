"""torch.library.opcheck of both operators for one variant on one backend."""

from __future__ import annotations

import torch

from lstm_triton import LSTMSpec, autograd
from lstm_triton.layer import Call
from tests.support.parity import RULES, Case, random_inputs


def check_operators(spec: LSTMSpec, backend: str) -> None:
    """Schema, fake and dispatch of both operators: saving or not, with and without projection, with rules and masks."""
    for options in (dict(proj_size=2, bidirectional=True, rules=RULES[3]), dict(bias=False)):
        case = Case(spec, T=2, B=2, I=3, H=4, **options)
        x, h_0, c_0, *weights = (t.detach() for t in random_inputs(case).values())
        ragged = (torch.tensor([2, 1]), torch.tensor([[True, False], [False, True]])) if case.bias else (None, None)
        inputs = (x, h_0, c_0, weights, *ragged, torch.tensor([7]) if case.rules.random else None)
        call = Call(spec.name, case.bias, case.proj_size > 0, {"triton": "stepwise", "torch": "eager"}[backend])
        call = call._replace(rules=case.rules)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        for save in (True, False):
            asked = call._replace(save=save, states=not save)
            torch.library.opcheck(autograd.layer_forward, (*inputs, *asked), test_utils=checks)
        call = call._replace(save=True, states=True)
        output, h_n, c_n, states, gates, cells = autograd.layer_forward(*inputs, *call)
        everything = [True] * (3 + len(weights))
        some = [n % 2 == 0 for n in range(3 + len(weights))]
        for grads, needs in (((output, h_n, c_n, states), everything), ((None, h_n, None, None), some)):
            arguments = (*grads, output, gates, cells, needs, *inputs, *call)
            torch.library.opcheck(autograd.layer_backward, arguments, test_utils=checks)
