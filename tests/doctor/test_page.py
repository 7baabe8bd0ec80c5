"""The doctor's page: worst first, nothing left out, no line too long."""

from helpers.machine_profiles import small_profile
from moeflow.doctor.finding import BROKEN, HARMFUL, Finding, as_json, works, worst_first
from moeflow.doctor.page import findings_text, profile_text

FINDINGS = [
    Finding("memory", "plenty"),
    Finding("swap", "much", HARMFUL, "it is slow", "use less"),
    Finding("disk", "full " * 40, BROKEN, "nothing can be written", "make room"),
    Finding("clock", "early", HARMFUL, "it is early", "set it"),
]


def test_the_worst_comes_first_and_equals_stay_in_order():
    assert [one.name for one in worst_first(FINDINGS)] == ["disk", "swap", "clock", "memory"]


def test_a_page_has_every_word_of_every_finding():
    text = findings_text(FINDINGS, 60)
    assert text.startswith("1 thing does not work, 2 could be better.")
    words = " ".join(text.split())
    assert all(part in words for one in FINDINGS for part in (one.name, one.found.strip(), one.wrong, one.remedy))
    assert max(map(len, text.splitlines())) <= 60
    assert findings_text(FINDINGS[:1]).startswith("Everything works.")


def test_only_what_is_broken_does_not_work():
    assert not works(FINDINGS)
    assert works(FINDINGS[:2])
    assert as_json(FINDINGS)["findings"][0] == FINDINGS[2]._asdict()
    assert as_json(FINDINGS)["works"] is False


def test_a_profile_measured_beside_other_programs_is_not_to_be_trusted():
    assert "measure again" not in profile_text(small_profile())
    text = profile_text(small_profile(others_load=0.5))
    assert "50 %" in text
    assert "measure again" in text
    assert "14 GB/s (2 threads)" in text
    assert "10 GB/s (1 token)" in text
