"""How gradients are divided into buckets."""

from __future__ import annotations

from mxnet import gluon

from trainer.step.buckets import Buckets, held, plan

MB = 2**20


def test_a_bucket_ends_with_the_gradient_that_fills_it_and_the_first_is_small():
    sizes = [MB, 4 * MB, 100, 3 * MB, 2 * MB, 9 * MB, MB]
    order = [6, 5, 4, 3, 2, 1, 0]
    assert plan(order, sizes, ["<f4"] * 7, 4 * MB) == [[6], [5], [4, 3], [2, 1], [0]]


def test_less_than_a_megabyte_holds_for_the_first_too():
    assert plan([2, 1, 0], [60, 60, 60], ["<f4"] * 3, 100) == [[2, 1], [0]]


def test_each_dtype_has_its_own_buckets():
    dtypes = ["<f4", "<f2", "<f4", "<f2"]
    assert plan([3, 2, 1, 0], [60] * 4, dtypes, 1000) == [[3, 1], [2, 0]]


def test_a_gradient_is_in_one_bucket_at_any_limit():
    sizes = [(17 * i * i + 1) % 91 for i in range(40)]
    for limit in (1, 10, 100, 10**6):
        buckets = plan(range(40), sizes, ["<f4"] * 40, limit)
        assert [index for bucket in buckets for index in bucket] == list(range(40))


def test_a_parameter_whose_place_in_forward_is_not_known_counts_as_of_the_last_layers():
    """As one that is an attribute of a plain Block, which collect_params does not find."""
    known, other = (gluon.Parameter(name, shape=(2,)) for name in ("known", "other"))
    for parameter in (known, other):
        parameter.initialize()
    assert Buckets([known, other], [known], megabytes=1e-6).planned() == [[other], [known]]


def test_every_second_bucket_of_the_last_layers_is_held_back_up_to_two_fifths_of_the_bytes():
    assert held([MB, *[4 * MB] * 10]) == {1, 3, 5, 7}  # 16 of 41 MB; another would be 20
    assert held([MB, 40 * MB, MB, MB]) == set()
    assert held([4, 4, 4, 4, 4]) == {1, 3}


def test_the_first_layers_bucket_is_never_held_back():
    assert held([]) == held([MB]) == held([9 * MB, MB]) == set()
    assert held([9 * MB, MB, 9 * MB]) == {1}
