"""The devices every PC operating system takes for granted."""
