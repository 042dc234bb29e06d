"""The validators of option values."""

from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from mcsd.errors import InvalidOption, InvalidParameter, check_int, check_number, check_token_ids


def _type(value: object) -> str:
    # Not its digits: pytest cannot print the large ones.
    return type(value).__name__


@pytest.mark.parametrize("value", [0, 6, -(10**5000), 10**5000, 2.0, True, None, "2", nan], ids=_type)
def test_check_int_refuses(value: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^size=.* is not an integer from 1 to 5 \(give size an integer"):
        check_int("size", value, 1, 5)


@pytest.mark.parametrize("value", [-0.1, 2.1, nan, inf, -inf, 10**5000, False, None, "1", 1j], ids=_type)
def test_check_number_refuses(value: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"^p=.* is not a number in \[0, 2\] \(give p a finite number"):
        check_number("p", value, 0, 2, error=InvalidParameter)


def test_bounds() -> None:
    check_int("size", 1, 1, 5)
    check_int("size", 5, 1, 5)
    check_number("p", 0, 0, 2)
    check_number("p", 2.0, 0, 2)
    check_number("p", 10**5000, 0, inf, low_open=True)
    with pytest.raises(InvalidOption, match=r"^p=0 is not a number in \(0, 2\]"):
        check_number("p", 0, 0, 2, low_open=True)
    with pytest.raises(InvalidOption, match=r"^p=inf is not a number in \(0, inf\)"):
        check_number("p", inf, 0, inf, low_open=True)


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, set()),
        (5, {5}),
        (-1, set()),
        (np.int64(5), {5}),
        (torch.tensor(5), {5}),
        ([5, np.int32(6), torch.tensor(7)], {5, 6, 7}),
        ({5, 6}, {5, 6}),
        ((), set()),
        (np.array([5, 6]), {5, 6}),
        (torch.tensor([5, 6]), {5, 6}),
    ],
)
def test_token_ids_of_every_kind(value: Any, ids: set[int]) -> None:
    found = check_token_ids("eos", value)
    assert found == ids
    assert {type(token) for token in found} <= {int}


@pytest.mark.parametrize("value", ["5", b"5", 1.5, True, [None], [[5]], {5: 5}, torch.tensor([[5]])], ids=_type)
def test_other_token_ids_are_refused(value: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"^eos=.* is not an integer"):
        check_token_ids("eos", value, InvalidParameter)
