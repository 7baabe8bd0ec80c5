"""Random numbers: the published generator's, in the ranges asked for."""

from moeflow.random_bits import RandomBits


def test_numbers_are_those_of_the_published_generator():
    bits = RandomBits(0)
    assert [bits.next() for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seeds_that_agree_in_64_bits_give_the_same_numbers():
    assert RandomBits(-1) == RandomBits(2**64 - 1)
    assert RandomBits(-1).next() == RandomBits(2**65 - 1).next()


def test_numbers_below_a_limit_take_each_value_and_no_other():
    bits = RandomBits(7)
    assert {bits.below(5) for _ in range(200)} == set(range(5))
    assert {bits.below(1) for _ in range(5)} == {0}


def test_units_lie_between_0_and_1_and_spread():
    bits = RandomBits(3)
    drawn = [bits.unit() for _ in range(1000)]
    assert 0 < min(drawn) < 0.01 < 0.99 < max(drawn) < 1
