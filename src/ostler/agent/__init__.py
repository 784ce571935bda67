"""The agent inside a guest, from the host: run commands, copy files, set the guest up, shut it down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ostler.agent.client import AgentClient
from ostler.agent.process import Process
from ostler.agent.requests import Completed, Terminal

if TYPE_CHECKING:
    from ostler.agent.answers import Copied as Copied
    from ostler.agent.answers import Grown as Grown
    from ostler.agent.answers import Info as Info

__all__ = ["AgentClient", "Completed", "Copied", "Grown", "Info", "Process", "Terminal"]


def __getattr__(name: str) -> Any:
    """Bring the kinds of answers: reading them takes longer than a command in a guest that is there already."""
    if name in {"Copied", "Grown", "Info"}:
        from ostler.agent import answers

        return getattr(answers, name)
    raise AttributeError(f"module 'ostler.agent' has no attribute {name!r}")
