"""PyTorch's flight recorder, as a rank's control server hands it out: how far each process group is.

The recorder numbers the collectives of every group. A rank that has enqueued fewer than its peers is behind;
one that has enqueued another operation under the same number is in a mismatched collective. What the recorder
does not know on every backend, the ranks of a group, the hook has written beside the socket.
"""

import json
from collections.abc import Mapping
from typing import Any

GROUPS_MAX = 64
_RANKS_MAX = 4096  # named; a larger group is cut


def groups_of(trace: Mapping[str, Any], members: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """One row for each group: name, ranks, enqueued, completed, op (the newest one enqueued).

    Errors: ValueError, TypeError, KeyError for what no flight recorder has written.
    """
    status: Mapping[str, Any] = trace.get("pg_status") or {}
    configured = _configured(trace.get("pg_config") or {})
    names, newest = {}, {}
    for entry in trace.get("entries") or ():
        group = str(entry["pg_id"])
        names[group] = str(entry["process_group"][0])
        if not entry.get("is_p2p"):
            newest[group] = entry
    found = []
    for group, row in list(status.items())[:GROUPS_MAX]:
        name, last = names.get(group, group), newest.get(group)
        found.append(
            {
                "name": name,
                "ranks": (members.get(name) or configured.get(name) or [])[:_RANKS_MAX],
                "enqueued": _newer(row["last_enqueued_collective"], last and last["collective_seq_id"]),
                "completed": int(row["last_completed_collective"]),
                "op": str(last["profiling_name"]) if last else "",
            }
        )
    return found


def members_of(lines: str) -> dict[str, list[int]]:
    """The ranks by the group's name, from what the hook has noted; of one name the newest line counts."""
    found: dict[str, list[int]] = {}
    for line in lines.splitlines():
        try:
            row = json.loads(line)
            ranks = [int(rank) for rank in row["ranks"]]
            found[str(row["name"])] = list(range(ranks[0], ranks[1] + 1)) if row["whole"] else ranks
        except (ValueError, TypeError, LookupError):  # a rank that was killed while it wrote
            continue
    return found


def _configured(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of backends that tell it: "[0, 1]"."""
    return {
        str(row.get("name")): [int(rank) for rank in json.loads(row.get("ranks") or "[]")]
        for row in config.values()
        if row.get("name")
    }


def _newer(reported: Any, recorded: Any) -> int:
    """An operation that is being issued is in the ring before it is in the status."""
    return max(int(reported), int(recorded or -1))
