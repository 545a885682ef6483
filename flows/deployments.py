"""What runs on a schedule: the one definition, for `vae-flows serve` and for prefect.yaml.

A deployment's parameter is its flow's complete configuration, so Prefect's page draws the form of it, filled
in with what will run. Only the root is left out of prefect.yaml: it is the worker's own VAE_FLOWS_ROOT.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from flows.config import Command, Encode, Report, Retrain, Serve, narrow
from flows.events import BY, DATASET_UPDATED, DRIFT_DETECTED, dataset, model

WORK_POOL = "vae-flows"
# A run that would overlap its predecessor is cancelled, and its state says why.
ONE_AT_A_TIME: dict[str, Any] = {"limit": 1, "collision_strategy": "CANCEL_NEW"}


@dataclass(frozen=True)
class Deployment:
    """A flow of `flows.<flow>.<flow>`, its configuration, and when it runs: by the clock, on events."""

    flow: str
    name: str
    config: Command
    cron: str
    events: tuple[dict[str, Any], ...] = field(default=())

    @property
    def entrypoint(self) -> str:
        return f"flows.{self.flow}.{self.flow}"

    def triggers(self) -> list[dict[str, Any]]:
        """An event that fits starts a run, as prefect.yaml and Prefect's API say it."""
        common = {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0}
        names = [f"{self.flow} {self.name} on {event['expect'][0]}" for event in self.events]
        events = copy.deepcopy(self.events)  # shared by two deployments, they would be aliases in YAML
        return [{"name": name, **common, **event} for name, event in zip(names, events, strict=True)]


def deployments(config: Serve) -> list[Deployment]:
    """Retrain, and with its champion the incremental encode of the same source and the report.

    >>> [(one.flow, one.name, one.cron) for one in deployments(Serve())]
    [('retrain', 'vae-digits', '0 3 * * *'), ('encode', 'vae-digits', '0 * * * *'), ('report', ...)]
    """
    name = config.model_name
    champion = f"models:/{name}@champion"
    encode = narrow(Encode, config, model=champion, scores=True)
    report = narrow(Report, config, model=champion, source="", out=None)
    # Retrain ingests too: a dataset that it has updated itself needs no other run.
    by_others = {"prefect.resource.id": dataset(config.source), BY: "!retrain"}
    on_dataset = {"expect": [DATASET_UPDATED], "match": by_others}
    on_drift = {"expect": [DRIFT_DETECTED], "match": {"prefect.resource.id": model(name)}}
    return [
        Deployment("retrain", name, narrow(Retrain, config), config.retrain_cron, (on_dataset, on_drift)),
        Deployment("encode", name, encode, config.encode_cron, (on_dataset,)),
        Deployment("report", name, report, config.report_cron),
    ]


def check_schedules(config: Serve) -> None:
    """Refuse a schedule that Prefect would refuse."""
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    for name in ("retrain_cron", "encode_cron", "report_cron"):
        cron = getattr(config, name)
        try:
            CronSchedule(cron=cron or "* * * * *", timezone=config.timezone)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{name}={cron!r} timezone={config.timezone!r}: {reason}") from error


def prefect_yaml(config: Serve) -> str:
    """The deployments as `prefect deploy --all` takes them; work pools: see deploy/."""
    import yaml

    content = {
        # The package is installed where a worker runs: there is nothing to pull.
        "pull": [],
        "deployments": [_as_yaml(one, config.timezone) for one in deployments(config)],
    }
    head = "# Written by `vae-flows serve --write prefect.yaml`; used by `prefect deploy --all`.\n"
    return head + yaml.safe_dump(content, sort_keys=False, width=110)


def _as_yaml(one: Deployment, timezone: str) -> dict[str, Any]:
    return {
        "name": one.name,
        "entrypoint": one.entrypoint,
        "work_pool": {"name": WORK_POOL},
        "schedules": [{"cron": one.cron, "timezone": timezone}] if one.cron else [],
        "concurrency_limit": dict(ONE_AT_A_TIME),
        "parameters": {"config": one.config.model_dump(mode="json", exclude={"root"})},
        "triggers": one.triggers(),
    }
