"""The agent inside a guest, from the host: run commands, copy files, set the guest up, shut it down."""

from __future__ import annotations

from ostler.agent.client import AgentClient
from ostler.agent.process import Process
from ostler.agent.requests import Completed, Copied, Grown, Info, Terminal

__all__ = ["AgentClient", "Completed", "Copied", "Grown", "Info", "Process", "Terminal"]
