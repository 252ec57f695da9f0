"""Batch normalization over the samples of all ranks; usable without the rest of the trainer.

docs/batch_norm.md has the mathematics and the cost.
"""

from .convert import (
    check_convertible,
    clear_cached_graphs,
    connect,
    convert_sync_batch_norm,
    disconnect,
    is_over_ranks,
    is_synced,
    layers_kept,
    layers_of,
    revert_sync_batch_norm,
)
from .layer import SyncBatchNorm
from .rank_sum import empty_batch
