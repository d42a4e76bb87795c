"""Regularised steps: dropout within the recurrence, zoneout, clipping; their rules, and the masks of a call.

Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else H), D directions. With h~ and
c~ for what a step computes,

    W_hh reads m h_{t-1}                recurrent dropout on h, one mask m for all steps (Gal & Ghahramani 2016)
    g = m_t tanh(a_g)                   recurrent dropout on the candidate, a mask m_t a step (Semeniuta et al. 2016)
    c~ = clip(f c_{t-1} + i g)          cell_clip
    h~ = clip(W_hr (o tanh(c~)))        proj_clip
    c_t = z_c c_{t-1} + (1 - z_c) c~    zoneout (Krueger et al. 2017): z is 0 or 1, drawn for each element and step, or,
    h_t = z_h h_{t-1} + (1 - z_h) h~    where nothing is drawn, its expectation

A peephole of the output gate on the current cell state reads c~. A mask of dropout is 0 or 1 / (1 - p).

The masks are drawn with Philox4x32-10 (Salmon et al. 2011), which computes any element from a seed and the element's
indices alone: so that every engine draws the same, and the backward pass draws again what the forward pass drew.
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton_kernels.gpus import gpu_of

CANDIDATE, ZONEOUT_H, ZONEOUT_C = 1, 2, 4
"""Bits of a code: the candidate is dropped; h_t is h_{t-1}; c_t is c_{t-1}."""

TRITON_INSTALLED = find_spec("triton") is not None

HIDDEN_STREAM = 3
"""The number of the mask on h among those that are drawn; the bits of a code have 0, 1 and 2."""

WORD = 0xFFFFFFFF
MULTIPLIERS, KEYS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
"""The constants of Philox4x32."""


class Rules(NamedTuple):
    """What a step does beside the equations of its variant; 0 for what it does not. Numbers that float32 has exactly.

    - hidden_dropout, candidate_dropout: probabilities of an element of h_{t-1} and of g being zeroed
    - zoneout_h, zoneout_c: probabilities of an element of h and of c keeping its value
    - cell_clip, proj_clip: limits of the absolute values of c and of a projected h
    """

    hidden_dropout: float = 0.0
    candidate_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float = 0.0
    proj_clip: float = 0.0

    @classmethod
    def rounded(cls, *values: float) -> Rules:
        """Return rules of the nearest numbers that float32 has."""
        return cls(*map(float32, values))

    @property
    def of_steps(self) -> tuple[tuple[int, float], ...]:
        """The bit and the probability of each mask that is drawn anew in each step."""
        rates = (CANDIDATE, self.candidate_dropout), (ZONEOUT_H, self.zoneout_h), (ZONEOUT_C, self.zoneout_c)
        return tuple((bit, rate) for bit, rate in rates if rate > 0)

    @property
    def random(self) -> bool:
        """Whether masks are drawn in training."""
        return self.hidden_dropout > 0 or len(self.of_steps) > 0

    def evaluated(self) -> Rules:
        """Return the rules without dropout, as they are where nothing is drawn."""
        return Rules(0.0, 0.0, *self[2:])  # of `_replace` the Dynamo of torch 2.11 makes what no operator takes


NONE = Rules()
"""No rules: the equations of the variant alone."""


def keep_scale(rate: float) -> float:
    """Return what dropout multiplies the elements with that it keeps, 1 / (1 - rate), as float32 has it."""
    return 0.0 if rate >= 1 else float32(1.0 / (1.0 - rate))


def float32(value: float) -> float:
    """Return the nearest number that float32 has; what Dynamo traces is rounded when it runs (`Call`)."""
    if torch.compiler.is_dynamo_compiling():
        return value
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


class KernelRules(NamedTuple):
    """The argument `rules` of a kernel; None for what there is not, which a kernel knows when it is compiled.

    - codes: (D, T, B, H) uint8, the bits CANDIDATE, ZONEOUT_H and ZONEOUT_C of each element; h has the first P units.
      Where they are None zoneout is its expectation
    - hidden: (D, B, P) in the compute type, what h_{t-1} is multiplied with before W_hh
    - clipped: (D, T, B, P) uint8, backward: where h~ is at its limit, so that its gradient is zero
    - candidate_scale: what g is multiplied with where it is not dropped
    - zoneout_h, zoneout_c: the probabilities
    - cell_clip, proj_clip: the limits
    """

    codes: Any = None
    hidden: Any = None
    clipped: Any = None
    candidate_scale: float | None = None
    zoneout_h: float | None = None
    zoneout_c: float | None = None
    cell_clip: float | None = None
    proj_clip: float | None = None


class Regularized(NamedTuple):
    """The rules of steps and the masks that were drawn for them, None where there is none.

    - codes: uint8, see `KernelRules`: (D, T, B, H) of a layer, (T, B, H) of one direction, (B, H) of one step
    - hidden: (D, B, P) of a layer, else (B, P)
    - clipped: bool, backward and with proj_clip: where h~ is at its limit; as codes, with P in place of H

    The methods, in PyTorch's own operators, are for a step or for all steps of one direction.
    """

    rules: Rules = NONE
    codes: Tensor | None = None
    hidden: Tensor | None = None
    clipped: Tensor | None = None

    def direction(self, n: int) -> Regularized:
        """Return what holds for one direction, of what holds for a layer."""
        if self is UNREGULARIZED:
            return self
        return Regularized(self.rules, *(None if masks is None else masks[n] for masks in self[1:]))

    def at(self, t: int | slice) -> Regularized:
        """Return what holds for a step, or some, of what holds for all steps of one direction."""
        if self is UNREGULARIZED:
            return self
        codes, clipped = (None if masks is None else masks[t] for masks in (self.codes, self.clipped))
        return self if codes is clipped is None else self._replace(codes=codes, clipped=clipped)

    def drop_hidden(self, h: Tensor) -> Tensor:
        """Return h_{t-1} (..., B, P) as W_hh reads it. The gradient goes the same way."""
        return h if self.hidden is None else h * self.hidden.to(h.dtype)

    def drop_candidate(self, g: Tensor) -> Tensor:
        """Return g (..., B, H) with its mask. The gradient goes the same way."""
        if self.codes is None or self.rules.candidate_dropout == 0:
            return g
        return (g * keep_scale(self.rules.candidate_dropout)).masked_fill(self.codes & CANDIDATE != 0, 0)

    def clip_cell(self, c: Tensor) -> Tensor:
        """Return c~ (..., B, H) within the limit; its gradient is zero beyond."""
        limit = self.rules.cell_clip
        return c.clamp(-limit, limit) if limit else c

    def clip_hidden(self, h: Tensor) -> Tensor:
        """Return the projected h~ (..., B, P) within the limit; its gradient is zero beyond."""
        limit = self.rules.proj_clip
        return h.clamp(-limit, limit) if limit else h

    def zone_hidden(self, h: Tensor, h_previous: Tensor) -> Tensor:
        """Return h_t from h~ and h_{t-1}, each (..., B, P)."""
        return self._zone(h, h_previous, ZONEOUT_H, self.rules.zoneout_h)

    def zone_cell(self, c: Tensor, c_previous: Tensor) -> Tensor:
        """Return c_t from c~ and c_{t-1}, each (..., B, H)."""
        return self._zone(c, c_previous, ZONEOUT_C, self.rules.zoneout_c)

    def split_hidden(self, dh: Tensor) -> tuple[Tensor, Tensor]:
        """Return of the gradient of h_t (..., B, P) that of h~, before its clip, and that of h_{t-1} by zoneout."""
        computed, kept = self._split(dh, ZONEOUT_H, self.rules.zoneout_h)
        return computed if self.clipped is None else computed.masked_fill(self.clipped, 0), kept

    def split_cell(self, dc: Tensor) -> tuple[Tensor, Tensor]:
        """Return of the gradient of c_t (..., B, H) that of c~ and that of c_{t-1} by zoneout."""
        return self._split(dc, ZONEOUT_C, self.rules.zoneout_c)

    def _split(self, d: Tensor, bit: int, rate: float) -> tuple[Tensor, Tensor]:
        if self.codes is None:
            return (1 - rate) * d, rate * d
        kept = self.codes[..., : d.shape[-1]] & bit != 0
        return d.masked_fill(kept, 0), d.masked_fill(~kept, 0)

    def _zone(self, new: Tensor, previous: Tensor, bit: int, rate: float) -> Tensor:
        if rate == 0:
            return new
        if self.codes is None:
            return new + rate * (previous - new)
        return torch.where(self.codes[..., : new.shape[-1]] & bit != 0, previous, new)

    def for_kernels(self) -> KernelRules:
        """Return them, of a layer, as the argument of a kernel."""
        rules = self.rules
        dropped = self.codes is not None and rules.candidate_dropout > 0
        scale = keep_scale(rules.candidate_dropout) if dropped else None
        clipped = None if self.clipped is None else self.clipped.contiguous().view(torch.uint8)
        return KernelRules(self.codes, self.hidden, clipped, scale, *(value or None for value in rules[2:]))


UNREGULARIZED = Regularized()
"""Steps by the equations of their variant alone."""


def drawn(rules: Rules, seed: Tensor | None, D: int, T: int, B: int, H: int, P: int, dtype: torch.dtype) -> Regularized:
    """Return the rules with masks drawn from a seed (1,) int64, on its device; with none where nothing is drawn."""
    if seed is None:
        return Regularized(rules.evaluated())
    draw_codes, draw_factors = step_codes, hidden_factors
    if drawn_by_kernels(seed):
        from lstm_triton_kernels import draw

        draw_codes, draw_factors = draw.step_codes, draw.hidden_factors
    codes = draw_codes(rules, seed, D, T, B, H) if rules.of_steps else None
    hidden = draw_factors(rules.hidden_dropout, seed, D, B, P, dtype) if rules.hidden_dropout else None
    return Regularized(rules, codes, hidden)


def drawn_by_kernels(seed: Tensor) -> bool:
    """Return whether masks are drawn by the kernels of draw.py: on a GPU that runs them, where nothing is traced."""
    return (
        seed.is_cuda
        and type(seed) is Tensor
        and torch.version.hip is None
        and TRITON_INSTALLED
        and gpu_of(seed.device).capability >= 80
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def step_codes(rules: Rules, seed: Tensor, D: int, T: int, B: int, H: int) -> Tensor:
    """Return the codes of all steps, (D, T, B, H) uint8."""
    codes = torch.zeros(D, T, B, H, dtype=torch.uint8, device=seed.device)
    for bit, rate in rules.of_steps:
        codes = codes + events(seed, bit.bit_length() - 1, rate, D, T, B, H).to(torch.uint8) * bit
    return codes


def hidden_factors(rate: float, seed: Tensor, D: int, B: int, P: int, dtype: torch.dtype) -> Tensor:
    """Return what h_{t-1} is multiplied with in all steps, (D, B, P) of a type: 0 or the scale of what is kept."""
    dropped = events(seed, HIDDEN_STREAM, rate, D, 1, B, P)[:, 0]
    return torch.full(dropped.shape, keep_scale(rate), dtype=dtype, device=seed.device).masked_fill(dropped, 0)


def events(seed: Tensor, stream: int, rate: float, D: int, T: int, B: int, units: int) -> Tensor:
    """Return which elements an event of that probability falls on, (D, T, B, units) bool.

    Unit u takes word u % 4 of the four that Philox makes of the counter (u // 4, row, time index, 2 · stream +
    direction); the event falls on it where the word is less than rate · 2^32.
    """
    device = seed.device
    quads, rows, times, directions = (
        torch.arange(n, dtype=torch.int64, device=device) for n in ((units + 3) // 4, B, T, D)
    )
    counter = (
        quads,
        rows[:, None],
        times[:, None, None],
        (2 * stream + directions)[:, None, None, None],
    )
    words = torch.stack(torch.broadcast_tensors(*philox(seed, *counter)), -1).flatten(-2)
    return words[..., :units] < threshold(rate)


def threshold(rate: float) -> int:
    """Return how many of the 2^32 words are an event of that probability."""
    return round(rate * 2.0**32)


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of 32 bits, as int64, from a seed of 64 bits and a counter of four words: Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # The product of two words may pass 2^63; its bits are right all the same.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEYS[0]) & WORD, (k1 + KEYS[1]) & WORD
    return c0, c1, c2, c3
