"""The host's side of devices: files, block devices, helper processes, sockets. They own descriptors; devices do not."""
