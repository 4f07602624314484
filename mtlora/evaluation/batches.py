"""Which examples run together."""

from collections.abc import Iterable, Sequence


def cut(
    order: Iterable[int], lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """Cut indices into batches of at most `batch_size` and, padded to their longest, `batch_tokens`; at least one each.

    lengths: tokens of each index.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if (
            not batches or len(batches[-1]) >= batch_size
            or (batch_tokens is not None and (len(batches[-1]) + 1) * longest > batch_tokens)
        ):  # fmt: skip
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches
