"""The tables of states: complete, and what the documents show."""

from pathlib import Path
from typing import Any

import pytest

from keepstep.core.states import ATTEMPT, CELL, INCIDENT, JOB, LIFE, NODE, JobEvent, JobState
from keepstep.core.states.table import Table, UnknownTransition

TABLES: list[Table[Any, Any]] = [JOB, ATTEMPT, CELL, NODE, LIFE, INCIDENT]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.noun)
def test_every_state_is_reachable_and_none_is_a_trap(table: Table[Any, Any]) -> None:
    states = set(type(table.first).__members__.values())
    reached, edge = {table.first}, {table.first}
    while edge:
        edge = {after for (state, _), after in table.rows.items() if state in edge} - reached
        reached |= edge
    assert reached == states
    if table.final:
        ends = set(table.final)
        while grown := {state for (state, _), after in table.rows.items() if after in ends} - ends:
            ends |= grown
        assert ends == states, "some state can never come to an end"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.noun)
def test_the_diagram_in_the_document_is_the_table(table: Table[Any, Any]) -> None:
    document = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    assert f"### {table.noun}\n```mermaid\n{table.mermaid()}```" in document


def test_an_unknown_event_raises() -> None:
    with pytest.raises(UnknownTransition, match="job is succeeded: no answer to place"):
        JOB.next(JobState.SUCCEEDED, JobEvent.PLACE)
