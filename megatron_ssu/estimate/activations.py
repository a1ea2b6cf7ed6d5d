"""What a layer keeps for its backward pass, in bytes.

Counted tensor by tensor, after Korthikanti et al. 2022 (arXiv 2205.05198), for what this project's layers are made of: RMSNorm,
rotary positions, grouped queries, gated MLP, no dropout; biases and windows keep nothing more. Per token, with h hidden, q and
k widths of query and key projection, f of the MLP, T tensor-parallel ranks, S = T under sequence parallelism and 1 without,
a and g query and key heads, e bytes per element:

    linear layers' inputs   e (h/S + q/T + h/S + f/T)
    norms                   local: 8 w + 4 (input and result in fp32), Transformer Engine: e w + 4; w = h/S
    q/k norms, whole        n (q + k)/T + 8; n = 8 in local layers with T = 1, else e (OLMo-2)
    q/k norms, by head      n (q + k)/T + 4 (a + g)/T; n = 8 in local layers, else e (Qwen3)
    gated activation        local: 4 e f/T, fused: 2 e f/T
    attention               local: 3 e q/T and, for s positions, (4 + e)/T a s (4/T a s in fp32) and s for the causal mask
                            flash: e (q + 2 k + q + k)/T + 4 a/T; its result is counted as the projection's input
    rotary positions        4 e d, once for all sequences of a micro-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ssu.models.experts import Experts
from megatron_ssu.models.family import Dims, Family, padded_vocab

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on a rank."""

    sequences: int
    length: int  # tokens of a sequence on this rank: context-parallel ranks divide them
    tensor: int
    sequence_parallel: bool
    itemsize: int  # bytes per element

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def split(self) -> int:
        """Ranks that divide what tensor parallelism alone replicates."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class Norms:
    """The norms of a layer."""

    hidden: int = 2  # as wide as the hidden size
    after: int = 0  # of these, how many follow attention and MLP
    qk: Literal["none", "whole", "head"] = "none"

    @classmethod
    def of(cls, family: Family) -> Norms:
        kinds = {kind.removeprefix("centred_") for entry in family.layer for kind in entry.kinds}
        hidden = [e.param for e in family.layer if e.kinds[0].removeprefix("centred_") == "norm"]
        qk: Literal["none", "whole", "head"] = (
            "whole" if "q_norm" in kinds else "head" if "head_norm" in kinds else "none"
        )
        return cls(len(hidden), sum("post_norm" in param for param in hidden), qk)


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps of one micro-batch, and those that its recomputation brings back for a while."""

    stored: float
    recomputed: float = 0.0


def layer_kept(
    dims: Dims,
    batch: MicroBatch,
    *,
    norms: Norms,
    engine: bool,
    recompute: Recompute,
    modules: Sequence[str] = (),
    capped: bool = False,
    sparse: bool = False,
) -> Kept:
    """Of one layer.

    engine: Transformer Engine with flash attention. capped: scores have a cap, which only megatron's own attention computes.
    sparse: the layer has experts, evenly loaded.
    """
    parts = _parts(dims, batch, norms, engine, capped)
    if sparse and dims.experts is not None:
        parts["mlp"] = _experts(dims, dims.experts, batch, engine)
    whole = sum(parts.values())
    if recompute == "full":
        return Kept(batch.itemsize * dims.hidden * batch.tokens / batch.split, whole)
    if recompute == "none":
        return Kept(whole)
    gone = kept = 0.0
    if "core_attn" in modules:
        gone += parts["attention"]
        # Its inputs stay: q, k, and v as a part of what the projection gave.
        widths = 2 * dims.heads + 3 * dims.groups
        kept += batch.itemsize * widths * dims.head / batch.tensor * batch.tokens
    if ("moe" if sparse else "mlp") in modules:
        gone += parts["mlp"]  # its input stays: the tensor that fc1 reads
        gone += parts["norms"] / norms.hidden if norms.after else 0.0  # the norm after it is a part of it
    return Kept(whole - gone + kept, gone)


def _parts(dims: Dims, batch: MicroBatch, norms: Norms, engine: bool, capped: bool) -> dict[str, float]:
    e, t, tokens = batch.itemsize, batch.tensor, batch.tokens
    query, key = dims.heads * dims.head / t, dims.groups * dims.head / t
    hidden, ffn = dims.hidden / batch.split, dims.ffn / t
    norm = (e if engine else 8) * hidden + 4
    if engine and not capped:
        attention = (e * (2 * query + 3 * key) + 4 * dims.heads / t) * tokens
    else:
        scores = ((4 if e == 4 else 4 + e) + (e if capped else 0)) * dims.heads / t * batch.length
        attention = (3 * e * query + scores) * tokens + batch.length**2
    extra = 0.0
    if norms.qk == "whole":
        extra = (e if engine or t > 1 else 8) * (query + key) + 8
    elif norms.qk == "head":
        extra = (e if engine else 8) * (query + key) + 4 * (dims.heads + dims.groups) / t
    return {
        "norms": norms.hidden * norm * tokens,
        "qk_norms": extra * tokens,
        "linear inputs": e * (hidden + query + hidden) * tokens,
        "rotary": 4 * e * dims.head * batch.length,
        "attention": attention,
        "mlp": ((2 if engine else 4) * e * ffn + e * ffn) * tokens,
    }


def _experts(dims: Dims, experts: Experts, batch: MicroBatch, engine: bool) -> float:
    """The router in fp32, and what the experts keep of the tokens that go through them, `active` times each."""
    e, tokens = batch.itemsize, batch.tokens / batch.split
    router = (4 * dims.hidden if e != 4 else 0) + 3 * 4 * experts.count
    # An expert's input, what its activation keeps, times the router's weight, and that product; the outputs of all of them.
    routed = e * dims.hidden + ((2 if engine else 5) * e + e) * experts.ffn + e * dims.hidden
    return (router + experts.active * routed) * tokens


def head_kept(dims: Dims, batch: MicroBatch, divisible_by: int, *, engine: bool, capped: bool = False) -> float:
    """Final norm, the head's input, and the cross entropy's softmax in fp32, [tokens, V / T]; with capped logits their tanh."""
    vocabulary = padded_vocab(dims.vocab, divisible_by) / batch.tensor
    norm = (batch.itemsize if engine else 8) * dims.hidden / batch.split + 4
    logits = (4 + (batch.itemsize if capped else 0)) * vocabulary
    return (norm + batch.itemsize * dims.hidden / batch.split + logits) * batch.tokens


def source_kept(dims: Dims, batch: MicroBatch, divisible_by: int, *, held: int) -> float:
    """Of train.regularize.kl, on the last stage: source logits of `held` micro-batches, and one gradient of logits."""
    vocabulary = padded_vocab(dims.vocab, divisible_by) / batch.tensor
    return batch.itemsize * vocabulary * batch.tokens * (held + 1)


def in_flight(stage: int, stages: int, virtual: int, micro_batches: int) -> int:
    """Micro-batches of a chunk that a stage holds at most between forward and backward: 1F1B, interleaved with `virtual`."""
    warm_up = stages - stage - 1
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * stages
    return min(warm_up + 1, micro_batches * virtual)
