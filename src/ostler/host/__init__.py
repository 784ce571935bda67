"""What the host kernel gives: memfds, eventfds, terminals. Knows nothing of guests."""
