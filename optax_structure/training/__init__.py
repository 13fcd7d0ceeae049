"""The main job as a library: data, the growing run, its checkpoints, its pictures."""

from optax_structure.training.checkpoint import CheckpointError as CheckpointError
from optax_structure.training.config import Config as Config
from optax_structure.training.data import Data as Data
from optax_structure.training.data import load_data as load_data
from optax_structure.training.loop import Interrupted as Interrupted
from optax_structure.training.loop import NonFiniteLoss as NonFiniteLoss
from optax_structure.training.loop import Progress as Progress
from optax_structure.training.loop import Result as Result
from optax_structure.training.loop import run_growth as run_growth
from optax_structure.training.run_state import Run as Run
