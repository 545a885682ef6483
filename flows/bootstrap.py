"""Bootstrap: what a Prefect server needs once beside the deployments; run again, it changes what differs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flows.config import Bootstrap
from flows.devices import GPU_LIMIT
from flows.events import DRIFT_DETECTED, MODEL_PROMOTED
from flows.results import Bootstrapped

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

RUN = "prefect.flow-run"
OVER = {f"{RUN}.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
# Those that are deployed: a run of theirs includes the other flows.
OUR_FLOWS = ("retrain", "encode", "report")
FAILURE = "{{ flow.name }} {{ flow_run.name }} is {{ flow_run.state.name }}: {{ flow_run.state.message }}"
EVENTS = {
    "promotion": (MODEL_PROMOTED, "{{ event.payload.model_uri }} is champion: {{ event.payload.reason }}"),
    "drift": (
        DRIFT_DETECTED,
        "{{ event.payload.new }} drifts from {{ event.payload.model }}: {{ event.payload.reason }}",
    ),
}


def bootstrap(config: Bootstrap) -> Bootstrapped:
    """Create or update the limit on GPUs, the automation for zombies and, with a block, the notifications."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        automations = [zombies(config.zombie_seconds)]
        if config.notify:
            automations += notifications(block_id(client, config.notify))
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, config.gpus)
        for automation in automations:
            put(client, automation)
    names = [automation.name for automation in automations]
    return Bootstrapped(gpus=config.gpus, automations=names, changed=True)


def put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create the automation, or update the one of its name."""
    if found := client.read_automations_by_name(automation.name):
        client.update_automation(found[0].id, automation)
    else:
        client.create_automation(automation)


def block_id(client: SyncPrefectClient, slug: str) -> Any:
    """The id of a notification block given as TYPE/NAME; ValueError where there is none."""
    from prefect.exceptions import ObjectNotFound

    kind, _, name = slug.partition("/")
    try:
        return client.read_block_document_by_name(name, kind, include_secrets=False).id
    except ObjectNotFound as error:
        raise ValueError(
            f"no block {slug!r} on the server: make one in Prefect's UI and give it as TYPE/NAME, "
            "such as slack-webhook/ops"
        ) from error


def zombies(seconds: int) -> AutomationCore:
    """A run whose heartbeat stays away is marked Crashed. Runs that began earlier are not seen."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    trigger = EventTrigger(
        after={f"{RUN}.heartbeat"},
        expect={f"{RUN}.heartbeat", *OVER},
        match=ResourceSpecification({"prefect.resource.id": f"{RUN}.*"}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )
    message = f"no heartbeat for {seconds} s: its process or machine is gone"
    crash = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=message, force=False)
    return AutomationCore(name="vae-flows: zombies are crashed", trigger=trigger, actions=[crash])


def notifications(block: Any) -> list[AutomationCore]:
    """A message through the block on failure, promotion and drift."""
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore

    failed = {f"{RUN}.Failed", f"{RUN}.Crashed"}
    ours = [{"prefect.resource.role": "flow", "prefect.resource.name": list(OUR_FLOWS)}]
    told = {"failure": (on(failed, related=ours), FAILURE)}
    told |= {name: (on({event}), body) for name, (event, body) in EVENTS.items()}
    return [
        AutomationCore(
            name=f"vae-flows: notify of {name}",
            trigger=trigger,
            actions=[SendNotification(block_document_id=block, subject=f"vae-flows: {name}", body=body)],
        )
        for name, (trigger, body) in told.items()
    ]


def on(events: set[str], related: list[dict[str, Any]] | None = None) -> EventTrigger:
    """Fires at each of these events."""
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    return EventTrigger(
        expect=events,
        match_related=[ResourceSpecification(one) for one in related or []],
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
