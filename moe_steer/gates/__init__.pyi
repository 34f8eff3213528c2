from moe_steer.gates.probe import Probe as Probe
from moe_steer.gates.probe_fit import fit_probe as fit_probe
