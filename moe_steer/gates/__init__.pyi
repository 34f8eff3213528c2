from moe_steer.gates.fitting import fit_logistic as fit_logistic
from moe_steer.gates.probe import Probe as Probe
