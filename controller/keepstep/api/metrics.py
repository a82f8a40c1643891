"""What Prometheus scrapes: made anew from the controller's own picture at each scrape."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from keepstep.control.loop import Controller
from keepstep.core.states import JobState, NodeState


class Collector:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterable[Metric]:
        members = list(self._controller.fleet.members.values())
        entries = list(self._controller.book.entries.values())
        nodes = GaugeMetricFamily("keepstep_nodes", "Nodes by state.", labels=["state"])
        for state in NodeState:
            nodes.add_metric([state], sum(member.state is state for member in members))
        yield nodes
        jobs = GaugeMetricFamily("keepstep_jobs", "Unfinished jobs by state.", labels=["state"])
        for job_state in JobState:
            jobs.add_metric([job_state], sum(entry.job.state == job_state for entry in entries))
        yield jobs
        labels = ["job", "name", "project"]
        step = GaugeMetricFamily("keepstep_job_step", "Completed optimizer steps.", labels=labels)
        age = GaugeMetricFamily(
            "keepstep_job_step_age_seconds", "Since a rank's step advanced.", labels=labels
        )
        attempt = GaugeMetricFamily("keepstep_job_attempt", "Number of the present attempt.", labels=labels)
        for entry in entries:
            names = [entry.job.id, entry.job.name, entry.job.project]
            step.add_metric(names, entry.progress.step)
            age.add_metric(names, self._controller.time.age(entry.progress.moved_at))
            attempt.add_metric(names, entry.job.attempt)
        yield from (step, age, attempt)
        yield GaugeMetricFamily(
            "keepstep_term", "Term of this controller.", value=self._controller.store.term
        )
