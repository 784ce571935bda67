"""Guest-physical memory: where it lies, its bytes, and its registration with a VM."""

from ostler.memory.guest import GuestMemory, MemoryFault
from ostler.memory.layout import Gpa, Region, RegionKind, ram_regions

__all__ = ["Gpa", "GuestMemory", "MemoryFault", "Region", "RegionKind", "ram_regions"]
