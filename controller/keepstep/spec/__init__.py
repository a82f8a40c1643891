"""The job spec: from the YAML that people write to the `JobSpec` that everything else works with."""

from keepstep.spec.explain import explain, paths, schema
from keepstep.spec.fit import nearest_layouts
from keepstep.spec.load import Checked, check, checked, command_spec, load
from keepstep.spec.presets import PRESETS, Preset
from keepstep.spec.problems import Problem, SpecError
from keepstep.spec.rankmap import rank_map
from keepstep.spec.record import from_dict, to_dict

__all__ = [
    "PRESETS",
    "Checked",
    "Preset",
    "Problem",
    "SpecError",
    "check",
    "checked",
    "command_spec",
    "explain",
    "from_dict",
    "load",
    "nearest_layouts",
    "paths",
    "rank_map",
    "schema",
    "to_dict",
]
