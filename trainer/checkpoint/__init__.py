"""What a run keeps, and how it finds it again."""

from .files import SaveError, Snapshot, load_parameters, problem, restore, snapshot, write
from .run_folder import find, find_best, find_latest, listing, prune, states, step_of
from .state import (
    MANIFEST,
    OPTIMIZER,
    PARAMETERS,
    STATE,
    CheckpointError,
    RunState,
    check_answers,
    read_state,
)
