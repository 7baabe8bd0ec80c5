"""The longest end of a text that occurred before, compared with a search, and what that costs."""

import random

import pytest

from moeflow.policy.lookup.suffix_automaton import SuffixAutomaton


def searched(text):
    """The length of the longest end that occurs earlier, and the places behind its occurrences."""
    for length in range(len(text) - 1, 0, -1):
        places = [at + length for at in range(len(text) - length) if text[at : at + length] == text[-length:]]
        if places:
            return length, places
    return 0, [0]


@pytest.mark.parametrize("num_letters", [1, 2, 3, 8])
def test_the_match_is_that_of_a_search(num_letters):
    draw = random.Random(num_letters)
    for _ in range(20):
        automaton, text = SuffixAutomaton(), []
        for _ in range(60):
            text.append(draw.randrange(num_letters))
            automaton.append(text[-1])
            length, place = automaton.longest()
            expected, places = searched(text)
            assert length == expected, text
            assert place in places, text


def test_in_a_text_that_says_the_same_again_the_place_is_the_latest():
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]:
        automaton.append(token)
    assert automaton.longest() == (3, 7)  # behind the second 1, 2, 3: 8 follows


def test_states_and_steps_are_linear_in_the_text():
    draw = random.Random(0)
    for letters in (1, 2, 50):
        automaton = SuffixAutomaton()
        for _ in range(3000):
            automaton.append(draw.randrange(letters))
        assert automaton.num_states <= 2 * 3000
        assert sum(map(len, automaton._next)) <= 3 * 3000
