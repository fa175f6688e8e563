"""Every operator of torch's own table, cut between layers: nothing wrong, nothing but the known frozen without need.

The rules are registered by operator; here they are asked through whatever function calls them.
`benchmarks/operators.py` does the same with more samples and writes a report.
"""

from __future__ import annotations

import pytest

from .operators import calls, missed, operators, patterns, sampled, wrong

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's samples include what it warns about

# Frozen although a cut of the operator alone would be exact, and why that stays.
OTHER_SHAPES = "the axis is one of space or of the batch, which no layer makes; its size fits by chance"
LINEAR_ALGEBRA = "the systems of a batch are independent; no layer cuts a batch of matrices"
POSITIONS = "exact only because torch's sample picks positions that are left"
SIZES = "the result has a size of its own, and nothing of the operand goes into it"
CONSERVATIVE: dict[str, str] = {
    "addbmm": "a sum over the batch of a product",
    "combinations": POSITIONS,
    "cov": "the checks of its weights reduce them",
    "cross": OTHER_SHAPES,
    "cumulative_trapezoid": "C++ repeats the distances; what they were taken from is not seen",
    "diff": "the sample takes no difference, so that the last operand is only checked",
    "diag_embed": OTHER_SHAPES,
    "stft": OTHER_SHAPES,
    "lu": LINEAR_ALGEBRA,
    "matrix_exp": LINEAR_ALGEBRA,
    "max": "the sample is positive, where a zero is never the largest",
    "meshgrid": "C++ repeats each side as often as the other is long, which is not seen",
    "min": "the sample is negative, where a zero is never the least",
    "_softmax_backward_data": OTHER_SHAPES,
    "aminmax": "a zero is neither the least nor the largest of the sample",
    "amax": "the sample is positive, where a zero is never the largest",
    "amin": "the sample is negative, where a zero is never the least",
    "nn.functional.adaptive_avg_pool2d": OTHER_SHAPES,
    "nn.functional.adaptive_max_pool2d": OTHER_SHAPES,
    "nn.functional.adaptive_max_pool3d": OTHER_SHAPES,
    "nn.functional.conv3d": OTHER_SHAPES,
    "nn.functional.group_norm": OTHER_SHAPES,
    "nn.functional.local_response_norm": OTHER_SHAPES,
    "nn.functional.pad": OTHER_SHAPES,
    "nn.functional.fractional_max_pool2d": OTHER_SHAPES,
    "nn.functional.max_pool3d": OTHER_SHAPES,
    "nn.functional.bilinear": "composed of a product of three that is summed in two steps",
    "nn.functional.triplet_margin_loss": "a difference plus an epsilon is not zero",
    "nn.functional.triplet_margin_with_distance_loss": "a difference plus an epsilon is not zero",
    "nn.functional.pairwise_distance": "a difference plus an epsilon is not zero",
    "nn.functional.embedding_bag": "no rule: a bag of words is summed or averaged in one call",
    "nn.functional.grid_sample": OTHER_SHAPES,
    "nn.functional.gaussian_nll_loss": "a check of the variances reduces them",
    "nn.functional.huber_loss": "no rule",
    "nn.functional.pdist": "no rule",
    "nn.functional.pixel_unshuffle": OTHER_SHAPES,
    "narrow_copy": OTHER_SHAPES,
    "dist": "no rule",
    "roll": "the sample rolls by nothing or a whole turn",
    "rot90": OTHER_SHAPES,
    "select_scatter": OTHER_SHAPES,
    "svd": LINEAR_ALGEBRA,
    "pinverse": LINEAR_ALGEBRA,
    "unique": POSITIONS,
    "unique_consecutive": POSITIONS,
    "new_zeros": SIZES,
    "new_ones": SIZES,
    "new_full": SIZES,
    "histogram": "no rule",
    "renorm": "no rule",
    "repeat": SIZES,
    "logdet": LINEAR_ALGEBRA,
    "norm": LINEAR_ALGEBRA,
    "linalg.cross": OTHER_SHAPES,
    "linalg.det": LINEAR_ALGEBRA,
    "linalg.lstsq": LINEAR_ALGEBRA,
    "linalg.slogdet": LINEAR_ALGEBRA,
    "linalg.lu_factor_ex": LINEAR_ALGEBRA,
    "linalg.lu": LINEAR_ALGEBRA,
    "linalg.pinv": LINEAR_ALGEBRA,
    "linalg.svd": LINEAR_ALGEBRA,
}
# An operand that the call does not read, only checks the shape of: torch refuses what the cut makes of it.
ONLY_CHECKED = ("diff#53",)


@pytest.mark.parametrize("operator", operators())
def test_what_is_exact_is_offered_and_nothing_else(operator: str) -> None:
    found: list[str] = []
    for call in calls(operator, 1):
        first, *others = patterns(call)
        for kinds, inference in ((first, False), (first, True), *((kinds, False) for kinds in others)):
            # one pattern is enough to see what inference mode leaves whole
            case = sampled(call, kinds, inference)
            if case is not None and call.name not in ONLY_CHECKED:
                assert not wrong(case), f"{call.name} of {kinds}\n{case.graph}\n{case.groups}"
            if case is not None and (kinds, inference) == (first, False):
                found += missed(case)
    if operator in CONSERVATIVE:
        assert found, f"{operator} is listed as frozen without need ({CONSERVATIVE[operator]}), and is not"
    else:
        assert not found, found
