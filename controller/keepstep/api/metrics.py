"""What Prometheus scrapes: made anew from the controller's own picture at each scrape."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from keepstep.control.loop import Controller
from keepstep.core.states import JobState, LifeState, NodeState


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
        yield from self._health()
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

    def _health(self) -> Iterable[Metric]:
        members = self._controller.fleet.members.values()
        lives = GaugeMetricFamily("keepstep_node_lives", "Nodes by their life as hardware.", labels=["life"])
        for life in LifeState:
            lives.add_metric([life], sum(member.life is life for member in members))
        yield lives
        decisions = CounterMetricFamily(
            "keepstep_health_decisions", "Findings of node health, by rule and what is done.",
            labels=["rule", "action"],
        )  # fmt: skip
        for (rule, action), times in self._controller.health.decisions.items():
            decisions.add_metric([rule, action], times)
        yield decisions
