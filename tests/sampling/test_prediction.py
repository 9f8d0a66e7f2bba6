"""Where an answer stands in what is expected of it."""

from random import Random

from loraserve.sampling.prediction import FIRST_CREDIT, Prediction

EXPECTED = list(range(100, 140))


def follow(prediction: Prediction, answer: list[int], count: int = 8) -> tuple[int, int]:
    """(steps, wrong guesses) of an answer whose guesses are checked `count` at once."""
    steps, wrong, at = 0, 0, 0
    while at < len(answer):
        guesses = prediction.next(count)
        right = 0
        while right < len(guesses) and at + right < len(answer) and guesses[right] == answer[at + right]:
            right += 1
        wrong += len(guesses) - right
        for token in answer[at : at + right + 1]:  # and the one that the step samples behind them
            prediction.append(token)
        at += right + 1
        steps += 1
    return steps, wrong


def test_what_comes_as_expected_comes_in_few_steps() -> None:
    assert follow(Prediction(EXPECTED), EXPECTED) == (5, 0)


def test_a_changed_token_is_gone_over() -> None:
    answer = [*EXPECTED[:10], 7, *EXPECTED[11:]]
    steps, wrong = follow(Prediction(EXPECTED), answer)
    assert steps <= 8
    assert wrong <= 8


def test_what_is_left_out_or_added_is_found_behind() -> None:
    for answer in (EXPECTED[:10] + EXPECTED[20:], [*EXPECTED[:10], 1, 2, 3, *EXPECTED[10:]], EXPECTED[20:]):
        steps, wrong = follow(Prediction(EXPECTED), answer)
        assert steps <= len(answer) // 2
        assert wrong <= 24


def test_of_several_places_the_nearest_counts() -> None:
    prediction = Prediction([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 5])
    for token in (1, 2, 3, 9, 8, 1, 2):
        prediction.append(token)
    assert prediction.next(1) == [4]


def test_what_never_comes_is_given_up() -> None:
    draw = Random(0)
    prediction = Prediction([draw.randrange(4) for _ in range(400)])
    _, wrong = follow(prediction, [draw.randrange(4) for _ in range(2000)])
    assert wrong < 2000
    prediction = Prediction([1, 2, 3] * 50)
    _, wrong = follow(prediction, [1, 2, 7] * 300)
    assert wrong <= FIRST_CREDIT + 8 + 300


def test_answers_to_one_prompt_stand_in_places_of_their_own() -> None:
    prediction = Prediction(EXPECTED)
    first, second = prediction.copy(), prediction.copy()
    first.append(EXPECTED[0])
    assert first.next(2) == EXPECTED[1:3]
    assert second.next(2) == EXPECTED[:2]
    assert Prediction([]).next(3) == []
