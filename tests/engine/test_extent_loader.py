"""ExtentLoader: how it shares the cores with the model."""

from loraserve.engine.extent_loader import MAX_OPEN_LOADS_AT_REST, REST_S, rest_s


def test_a_check_or_a_single_load_leaves_the_cores_to_the_model() -> None:
    assert rest_s(0) == rest_s(1) == REST_S > 0


def test_open_loads_share_the_rest() -> None:
    rests = [rest_s(num_open) for num_open in range(1, MAX_OPEN_LOADS_AT_REST + 1)]
    assert rests == [REST_S / num_open for num_open in range(1, MAX_OPEN_LOADS_AT_REST + 1)]


def test_a_queue_of_loads_is_read_at_full_speed() -> None:
    assert rest_s(MAX_OPEN_LOADS_AT_REST + 1) == 0.0
    assert rest_s(1000) == 0.0
