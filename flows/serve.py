"""Serve: retrain, encode and report on a schedule and on events, from one process."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from flows.config import Serve
from flows.deployments import ONE_AT_A_TIME, Deployment, deployments, prefect_yaml
from flows.local_server import prefect_api
from flows.results import Served

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

logger = logging.getLogger("vae_flows.serve")


def serve(config: Serve) -> Served:
    """Run the deployments from this process until it is stopped, or write them down as a prefect.yaml."""
    if config.write is not None:
        config.write.write_text(prefect_yaml(config))
        return Served(written=config.write, changed=True)
    import prefect

    with prefect_api(services=True):
        found = [to_prefect(one, config) for one in deployments(config)]
        for one in found:
            logger.info("serve: %s/%s", one.flow_name, one.name)
        prefect.serve(*found, print_starting_message=False)
    return Served(changed=True)


def to_prefect(one: Deployment, config: Serve) -> RunnerDeployment:
    """The deployment as Prefect runs it from this process."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import EntrypointType
    from prefect.events import DeploymentEventTrigger
    from prefect.flows import load_flow_from_entrypoint
    from prefect.schedules import Cron

    root = {"root": str(config.root.resolve())}
    deployment = load_flow_from_entrypoint(one.entrypoint).to_deployment(
        one.name,
        parameters={"config": one.config.model_dump(mode="json") | root},
        schedule=Cron(one.cron, timezone=config.timezone) if one.cron else None,
        concurrency_limit=ConcurrencyLimitConfig(**ONE_AT_A_TIME),
        triggers=[DeploymentEventTrigger(**trigger) for trigger in one.triggers()],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return cast("RunnerDeployment", deployment)
