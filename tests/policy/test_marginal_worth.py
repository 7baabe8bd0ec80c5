"""What a byte of memory is worth, in plain numbers."""

from moeflow.policy.marginal_worth import expert_worth, kept_worth

CHAT = {"num_tokens": 1000, "num_bytes": 10_000_000, "reused_share": 0.5, "prefill_s": 0.01}  # 10 s to compute again


def test_a_byte_of_experts_is_worth_its_part_of_the_waiting():
    assert expert_worth(0.5, 1_000_000_000) == 0.5e-9
    assert expert_worth(0.5, 500_000_000) == 2 * expert_worth(0.25, 500_000_000) == 1e-9


def test_where_all_experts_are_there_no_more_bytes_of_them_are_worth_anything():
    assert expert_worth(0.5, 0) == 0


def test_what_was_kept_is_worth_less_the_longer_nobody_wanted_it():
    assert kept_worth(**CHAT, idle_s=60) == kept_worth(**CHAT, idle_s=0) / 2
    assert kept_worth(**CHAT, idle_s=0) == 0.5 / 60 * 10 / 10_000_000


def test_what_takes_longer_to_compute_again_or_is_wanted_more_often_is_worth_more():
    for more in ({"num_tokens": 2000}, {"prefill_s": 0.02}, {"reused_share": 1.0}, {"num_bytes": 5_000_000}):
        assert kept_worth(**CHAT | more, idle_s=7) == 2 * kept_worth(**CHAT, idle_s=7)


def test_what_nobody_has_measured_is_kept():
    assert kept_worth(**CHAT | {"prefill_s": None}, idle_s=1e9) > expert_worth(1.0, 1)


def test_a_conversation_that_goes_on_stays_and_one_of_an_hour_ago_leaves_for_experts_that_are_waited_for():
    experts = expert_worth(0.3, 1_000_000_000)
    assert kept_worth(**CHAT, idle_s=30) > experts > kept_worth(**CHAT, idle_s=3600)
