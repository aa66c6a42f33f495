"""A long short-term memory that goes through a sequence from both ends.

It is written step by step because torch's own has no batching rule, and the sequences are short.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["both_ways"]


def both_ways(x: Tensor, W_x: Tensor, W_h: Tensor, b: Tensor) -> Tensor:
    """The states (P, 2h) of a bidirectional layer, forward beside backward, as torch.nn.LSTM's.

    Args:
        x: (P, n).
        W_x: (2, 4h, n), of both directions; rows are the input, forget, cell and output gates'.
        W_h: (2, 4h, h).
        b: (2, 4h), the sum of torch's two biases.
    """
    from_each_end = torch.stack([x, x.flip(0)])  # (2, P, n)
    gates = torch.baddbmm(b.unsqueeze(1), from_each_end, W_x.mT)  # (2, P, 4h)
    h = c = W_h.new_zeros(2, 1, W_h.shape[-1])
    states = []
    for step in gates.unbind(1):
        i, f, g, o = torch.baddbmm(step.unsqueeze(1), h, W_h.mT).chunk(4, -1)  # (2, 1, h)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    forward, backward = torch.cat(states, 1).unbind(0)  # (P, h)
    return torch.cat([forward, backward.flip(0)], -1)
