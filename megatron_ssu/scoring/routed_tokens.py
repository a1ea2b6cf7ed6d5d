"""Which tokens the experts of a layer get: what statistics of their inputs go by."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_ssu.engine.experts import gathering_dispatcher

_BLOCK = 1 << 22  # elements that are widened to float64 at a time


class RoutedTokens:
    """Follows a layer's tokens to its experts while a calibration pass lasts.

    The layer exchanges tokens by a dispatcher that gathers them from all ranks meanwhile, whatever it trains with: its order
    of tokens is known.
    """

    def __init__(self, layer: MoELayer) -> None:
        self._layer, self._trained_with = layer, layer.token_dispatcher
        layer.token_dispatcher = gathering_dispatcher(layer)
        self._shares = torch.empty(0)

    def begin(self, mask: Tensor | None, length: int, first: int, shape: torch.Size) -> None:
        """Tokens [s, b, H] = `shape` come in, those from `first` on of sequences of `length`.

        mask: bool [b, length], the real ones; None: all. Collective over tensor- and expert-parallel ranks.
        """
        device = next(self._layer.parameters()).device
        if mask is None:
            shares = torch.full(shape[:2], 1.0 / length, dtype=torch.float64, device=device)
        else:
            whole = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
            shares = whole[:, first : first + shape[0]].t().contiguous()
        group = self._layer.token_dispatcher.tp_ep_group
        self._shares = gather_from_sequence_parallel_region(shares.view(-1), group=group)

    def sums(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens x [t, I] that the layer's own expert `expert` gets: float64 [I], the sum over the real ones of X_tj^2,
        and the same with every token divided by the real tokens of its row."""
        dispatcher: Any = self._layer.token_dispatcher
        shares = self._shares[dispatcher.local_map[:, expert]]
        squares = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        means = squares.clone()
        step = max(1, _BLOCK // x.shape[1])
        for part, share in zip(x.split(step), shares.split(step), strict=True):
            values = part.double().square()
            squares += (share > 0).double() @ values
            means += share @ values
        return squares, means

    def close(self) -> None:
        """Exchange tokens as before."""
        self._layer.token_dispatcher = self._trained_with
