"""A guest that did not boot: its agent is there already, and it is to become another than it was."""

from __future__ import annotations

from typing import Any

from ostler.client import guests
from ostler.client.running import RunningGuest
from ostler.errors import AgentError


class RestoredGuest(RunningGuest):
    """One that goes on from a snapshot, or from its parent."""

    def configure(self) -> None:
        """Hostname, time of day, random bytes of its own. A guest without an agent goes on as it is."""
        if self.plan.spec.vsock_cid is None:
            return
        try:
            self.agent.become_another(**{**self._network(), **self.plan.settings})
        except AgentError as error:
            raise self.explain(error) from error

    def _network(self) -> dict[str, Any]:
        """IP addresses it has: they are the same in every network of passt's. MAC addresses are each guest's own."""
        if not self.plan.spec.nets:
            return {}
        facts = guests.request(self.entry, "inspect")
        self.troubles = [str(each) for each in facts.get("troubles", [])]
        found = {"dns": facts.get("network", {}).get("dns"), "interfaces": facts.get("macs")}
        return {name: value for name, value in found.items() if value}
