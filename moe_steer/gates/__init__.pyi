from moe_steer.gates.probe import Probe as Probe
