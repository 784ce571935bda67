"""What virtio-net puts before every frame, its feature bits and its control commands: virtio 1.2 section 5.1."""

from __future__ import annotations

import struct

# struct virtio_net_hdr_v1: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
HEADER = struct.Struct("<BBHHHHH")
HEADER_BYTES = HEADER.size
NUM_BUFFERS_OFFSET = 10

FLAG_DATA_VALID = 2
NO_SEGMENTATION = 0

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_CTRL_GUEST_OFFLOADS = 1 << 2
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_GUEST_ANNOUNCE = 1 << 21
F_CTRL_MAC_ADDR = 1 << 23

# What the host may hand to the guest unfinished; the driver can turn these off later (section 5.1.6.5.6).
GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
OFFLOADS = GUEST_OFFLOADS | F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN

STATUS_LINK_UP, STATUS_ANNOUNCE = 1, 2

CTRL_RX, CTRL_MAC, CTRL_ANNOUNCE, CTRL_GUEST_OFFLOADS = 0, 1, 3, 5
CTRL_RX_COMMANDS = range(6)
CTRL_MAC_TABLE_SET, CTRL_MAC_ADDR_SET = 0, 1
CTRL_ANNOUNCE_ACK = 0
CTRL_GUEST_OFFLOADS_SET = 0
CTRL_OK, CTRL_ERR = b"\0", b"\1"

MAC_BYTES = 6
ETHERNET_BYTES = 14
# A frame of the largest IP packet, with two VLAN tags; nobody sends more, so more is dropped.
MAX_FRAME_BYTES = 65535 + ETHERNET_BYTES + 8
MIN_MTU, MAX_MTU = 68, 65535
