"""Every setting of a run: ``config.load("configs/quickstart.yaml")``, ``Config(name="mine")``."""

from ..errors import ConfigError
from .load import all_settings, as_yaml, differences, from_dict, load, recorded, to_dict
from .schema import Checkpoint, Config, Data, Evaluate, Model, Monitor, Optimizer, Schedule, Train
