"""Training any model with ``fit``, and the main job as a library: data, the growing run, checkpoints, pictures."""

from optax_structure.training.checkpoint import CheckpointError as CheckpointError
from optax_structure.training.config import Config as Config
from optax_structure.training.data import Data as Data
from optax_structure.training.data import load_data as load_data
from optax_structure.training.fit import Epoch as Epoch
from optax_structure.training.fit import FitNonFiniteLoss as FitNonFiniteLoss
from optax_structure.training.fit import FitResult as FitResult
from optax_structure.training.fit import fit as fit
from optax_structure.training.load_params import Loaded as Loaded
from optax_structure.training.load_params import load_params as load_params
from optax_structure.training.loop import Interrupted as Interrupted
from optax_structure.training.loop import NonFiniteLoss as NonFiniteLoss
from optax_structure.training.loop import Progress as Progress
from optax_structure.training.loop import Result as Result
from optax_structure.training.loop import run_growth as run_growth
from optax_structure.training.rate_plots import RateRecord as RateRecord
from optax_structure.training.rate_plots import RateTrace as RateTrace
from optax_structure.training.rate_plots import plot_rates as plot_rates
from optax_structure.training.rate_plots import rate_record as rate_record
from optax_structure.training.rate_plots import trace_rates as trace_rates
from optax_structure.training.run_state import Run as Run
