"""KVM's user interface on x86-64: structures, ioctl numbers, constants.

Checked against the kernel's own header by tests/accel/test_abi.py, name by name.

- `state`: one virtual CPU
- `board`: the virtual machine around it
- `run`: the page shared while running
- `requests`: ioctl numbers
"""
