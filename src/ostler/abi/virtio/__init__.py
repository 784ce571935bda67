"""Numbers and layouts of virtio 1.2, named as in the specification and the kernel's headers."""
