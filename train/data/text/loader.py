"""Batches of rows ahead of the step, by grain's threads; where they stand is one number."""

from typing import Any

import numpy as np

from train.data.text.rows import TrainRows
from train.errors import UserError

_ENDLESS = 1 << 48  # rows


def make_iterator(
    rows: TrainRows,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    num_threads: int = 2,
    prefetch: int = 16,
) -> Any:
    """grain's iterator of int32[batch_size / count, length + 1], without end.

    Batch i holds the rows i * batch_size ... (i + 1) * batch_size - 1; host j of n gets the rows j, j + n, ... of it.
    get_state() is JSON, the number of the next batch; set_state() goes on from there with the same batches.

    Args:
      batch_size: over all hosts.
      shard: (this host, hosts).
      num_threads, prefetch: threads that read ahead, and batches that wait; 0 and 0 read when asked.

    Raises:
      UserError: the batch cannot be dealt out evenly.
    """
    import grain

    index, count = shard
    if batch_size % count:
        raise UserError(
            f"config.batch_size={batch_size} cannot be dealt to {count} hosts; use a multiple of {count}"
        )
    dataset = grain.MapDataset.range(index, _ENDLESS, count).map(rows.row)
    dataset = dataset.batch(batch_size // count, batch_fn=np.stack)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
