"""The life of a node as hardware: from well to suspect to proven well again. Its connection's is `node`.

Each state has an owner, a deadline and a way back:

    suspect      triage's; cleared when its evidence is gone for good, validated after `suspect`
    cordoned     its job's, which ends by itself, or is drained after `idle`; a person's has no deadline
    draining     its job's, which moves when a spare stands by, and is ended at the drain's deadline
    quarantined  the next repair's; a person's, where no hook can do it, or nothing could be tested
    repairing    the hook's, for its own time and `return`; then validated, or the next repair
    validating   a small job of keepstep's own, for `validate`; then probation, or the next repair
    probation    time's: it works, and is looked at more strictly; healthy after `probation`
    replace      a person's, or the hook `ticket`'s; validated when another machine has come

A person may uncordon in any of them. What its pool will take away drains, too, and is the pool's.
"""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class LifeState(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # gets no new work while it is watched
    CORDONED = "cordoned"  # gets no new work; what runs there goes on to its end
    DRAINING = "draining"  # its job leaves it as soon as that costs little, at the deadline at the latest
    QUARANTINED = "quarantined"  # empty; waits for its repair
    REPAIRING = "repairing"
    VALIDATING = "validating"
    PROBATION = "probation"  # works again; the next fault counts as a relapse
    REPLACE = "replace"  # repairs have not helped: another machine, or another part


class LifeEvent(StrEnum):
    SUSPECT = "suspect"
    CLEAR = "clear"  # what it was taken out for is gone, or was not its fault
    CORDON = "cordon"
    DRAIN = "drain"
    EMPTY = "empty"  # nothing of any job is left on it
    REPAIR = "repair"
    REPAIRED = "repaired"
    FAIL = "fail"  # the repair or the validation; or there was nothing to validate it by
    VALIDATE = "validate"
    PASS = "pass"  # noqa: S105 - of a validation
    PROVE = "prove"
    CONDEMN = "condemn"
    REPLACED = "replaced"
    UNCORDON = "uncordon"


_L, _E = LifeState, LifeEvent

LIFE = Table(
    noun="life",
    first=_L.HEALTHY,
    rows=rows(
        (_L.HEALTHY, _E.SUSPECT, _L.SUSPECT),
        ((_L.SUSPECT, _L.CORDONED, _L.DRAINING), _E.CLEAR, _L.HEALTHY),
        ((_L.HEALTHY, _L.SUSPECT, _L.PROBATION), _E.CORDON, _L.CORDONED),
        ((_L.HEALTHY, _L.SUSPECT, _L.CORDONED, _L.PROBATION), _E.DRAIN, _L.DRAINING),
        ((_L.CORDONED, _L.DRAINING), _E.EMPTY, _L.QUARANTINED),
        (_L.QUARANTINED, _E.REPAIR, _L.REPAIRING),
        (_L.REPAIRING, _E.REPAIRED, _L.VALIDATING),
        ((_L.REPAIRING, _L.VALIDATING), _E.FAIL, _L.QUARANTINED),
        (_L.QUARANTINED, _E.VALIDATE, _L.VALIDATING),
        (_L.VALIDATING, _E.PASS, _L.PROBATION),
        (_L.PROBATION, _E.PROVE, _L.HEALTHY),
        (_L.QUARANTINED, _E.CONDEMN, _L.REPLACE),
        (_L.REPLACE, _E.REPLACED, _L.VALIDATING),
        (
            (
                _L.SUSPECT,
                _L.CORDONED,
                _L.DRAINING,
                _L.QUARANTINED,
                _L.REPAIRING,
                _L.VALIDATING,
                _L.PROBATION,
                _L.REPLACE,
            ),
            _E.UNCORDON,
            _L.HEALTHY,
        ),
    ),
)

WORKING = frozenset({LifeState.HEALTHY, LifeState.PROBATION})  # in all others a node gets no new work
HELD = frozenset({LifeState.CORDONED, LifeState.DRAINING})  # something may still run there
