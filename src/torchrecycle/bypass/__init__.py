"""The bypass: run an unmodified model up to its cut, or from it on, and prove that nothing else changed.

`Probes` runs a model at several sizes; `make_plan` finds out which calls can be skipped; `Bypass` runs the halves
through the slots of the `Interceptor`; `prove` compares them with the whole.
"""

from torchrecycle.bypass.bypass import Bypass
from torchrecycle.bypass.example import BatchRule, device_of, example_inputs, run_or_explain
from torchrecycle.bypass.inputs import Inputs, parameter_names
from torchrecycle.bypass.interceptor import Interceptor, compare_autocast, evaluating
from torchrecycle.bypass.offload import Offloaded, OffloadReport, only_in_prefix
from torchrecycle.bypass.plan import Plan, make_plan
from torchrecycle.bypass.probes import Probes, take_rows
from torchrecycle.bypass.proof import (
    Padding,
    first_difference,
    noise,
    positions,
    prove,
    prove_rows,
    relative_difference,
)
from torchrecycle.bypass.sequences import Sequences, sequences_of

__all__ = [
    "BatchRule",
    "Bypass",
    "Inputs",
    "Interceptor",
    "OffloadReport",
    "Offloaded",
    "Padding",
    "Plan",
    "Probes",
    "Sequences",
    "compare_autocast",
    "device_of",
    "evaluating",
    "example_inputs",
    "first_difference",
    "make_plan",
    "noise",
    "only_in_prefix",
    "parameter_names",
    "positions",
    "prove",
    "prove_rows",
    "relative_difference",
    "run_or_explain",
    "sequences_of",
    "take_rows",
]
