"""virtio 1.2: queues, transports and devices."""
