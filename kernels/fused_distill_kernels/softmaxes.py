"""Both models' probabilities of a tile of logits, given the statistics of its row."""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2_E
from .row_statistics import LSE_DIFFERENCE, MAX_S, MAX_T, SUM_S, SUM_T
from .tile import gap_beyond, offset_between


@triton.jit
def softmax_parts(row_ptr, factor):
    """Return the numbers of a row that `distributions` needs.

    Its exponentials are relative to rounded powers of 2, so that they take one operation. Two factors per row
    make up for the rounding.
    """
    max_s, max_t = tl.load(row_ptr + MAX_S), tl.load(row_ptr + MAX_T)
    offset = offset_between(max_s, max_t, factor)
    top_t = max_t - offset
    power_s, power_t = tl.fma(max_s, factor * LOG2_E, 0.0), tl.fma(top_t, factor * LOG2_E, 0.0)
    rounding_s, rounding_t = (
        tl.fma(max_s, factor * LOG2_E, -power_s),
        tl.fma(top_t, factor * LOG2_E, -power_t),
    )
    inverse_s = tl.math.exp2(-rounding_s) / tl.load(row_ptr + SUM_S)
    inverse_t = tl.math.exp2(-rounding_t) / tl.load(row_ptr + SUM_T)
    shift = (top_t - max_s) * factor + tl.load(row_ptr + LSE_DIFFERENCE)
    return offset, power_s, power_t, inverse_s, inverse_t, shift


@triton.jit
def distributions(pair, softmax, factor, TRANSFORM: tl.constexpr):
    """Return p_s, p_t and d = log p_t - log p_s of one tile, given its `load_pair`.

    p_s and p_t are multiples of the probabilities if the inverses in `softmax` are multiplied by a number.
    """
    v_s, v_t, extra, _ = pair
    offset, power_s, power_t, inverse_s, inverse_t, shift = softmax
    v_t -= offset
    p_s = tl.math.exp2(tl.fma(v_s, factor * LOG2_E, -power_s)) * inverse_s
    p_t = tl.math.exp2(tl.fma(v_t, factor * LOG2_E, -power_t)) * inverse_t
    return p_s, p_t, gap_beyond(v_s, v_t, extra, offset, TRANSFORM) * factor - shift
