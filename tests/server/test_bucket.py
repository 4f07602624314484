"""The rate limit with bursts."""

from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.bucket import TokenBucket


@given(
    rate=st.floats(0.1, 100),
    capacity=st.floats(1, 100),
    takes=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), max_size=50),
)
def test_a_bucket_gives_at_most_its_rate_and_one_burst(
    rate: float, capacity: float, takes: list[tuple[float, float]]
) -> None:
    bucket, now, taken, largest = TokenBucket(0.0), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.seconds_until(1.0, rate, capacity, now) == 0:
            bucket.take(amount, rate, capacity, now)
            taken += amount
            largest = max(largest, amount)
    assert taken <= capacity + rate * now + largest + 1e-6
