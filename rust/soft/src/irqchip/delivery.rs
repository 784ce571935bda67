//! Interrupt messages: what travels from an IOAPIC pin, an MSI or an ICR write to the local APICs.
//!
//! Intel SDM volume 3, sections "Issuing Interprocessor Interrupts" and "Determining IPI
//! Destination"; the MSI formats of section "Message Address/Data Register Format".
//! Left out on purpose, as in KVM: SMI (no SMM), focus processor, bus arbitration (a lowest
//! priority message picks its target by hashing the vector over the candidates).

use super::lapic::LapicCell;
use std::sync::Arc;

/// Destination that means every local APIC, in an 8-bit destination field.
pub(crate) const XAPIC_BROADCAST: u32 = 0xff;
/// Destination that means every local APIC, for x2APIC destinations.
pub(crate) const X2APIC_BROADCAST: u32 = 0xffff_ffff;

const DFR_MODEL_FLAT: u32 = 0xf;
const DFR_MODEL_CLUSTER: u32 = 0x0;

/// Delivery mode field of an ICR, a redirection entry, an LVT entry or MSI data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl DeliveryMode {
    /// Decodes the three low bits of `field`.
    pub(crate) fn from_field(field: u32) -> Self {
        match field & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// One interrupt message on its way to the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub vector: u8,
    pub mode: DeliveryMode,
    /// Trigger mode: level (true) or edge.
    pub level: bool,
    /// Level field: only INIT and level-triggered messages can be de-asserted.
    pub assert: bool,
    pub logical: bool,
    pub destination: u32,
    /// MSI redirection hint: one of the destinations takes the message.
    pub redirection_hint: bool,
}

/// Destination shorthand of an ICR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shorthand {
    None,
    ToSelf,
    All,
    AllButSelf,
}

/// An interprocessor interrupt as the ICR describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ipi {
    pub message: Message,
    pub shorthand: Shorthand,
}

impl Ipi {
    /// Decodes an ICR value whose destination has been widened to `destination`.
    pub(crate) fn from_icr(low: u32, destination: u32) -> Self {
        let shorthand = match (low >> 18) & 3 {
            0 => Shorthand::None,
            1 => Shorthand::ToSelf,
            2 => Shorthand::All,
            _ => Shorthand::AllButSelf,
        };
        let message = Message {
            vector: low as u8,
            mode: DeliveryMode::from_field(low >> 8),
            level: low & (1 << 15) != 0,
            assert: low & (1 << 14) != 0,
            logical: low & (1 << 11) != 0,
            destination,
            redirection_hint: false,
        };
        Self { message, shorthand }
    }
}

impl Message {
    /// Decodes an MSI. With `wide_destination` (KVM_X2APIC_API_USE_32BIT_IDS) the upper address
    /// half carries destination bits 31:8.
    pub(crate) fn from_msi(address: u64, data: u32, wide_destination: bool) -> Self {
        let low = address as u32;
        let mut destination = (low >> 12) & 0xff;
        if wide_destination {
            destination |= (address >> 32) as u32 & 0xffff_ff00;
        }
        Self {
            vector: data as u8,
            mode: DeliveryMode::from_field(data >> 8),
            level: data & (1 << 15) != 0,
            assert: true,
            logical: low & (1 << 2) != 0,
            destination,
            redirection_hint: low & (1 << 3) != 0,
        }
    }

    fn goes_to_one(&self) -> bool {
        // A physical broadcast has no lowest priority: KVM delivers it to everybody.
        let broadcast = !self.logical && self.destination == XAPIC_BROADCAST;
        (self.mode == DeliveryMode::LowestPriority || self.redirection_hint) && !broadcast
    }
}

/// What destination matching must know of a local APIC, readable without its lock.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Address {
    /// The APIC ID the processor was made with.
    pub initial_id: u32,
    pub xapic_id: u8,
    pub ldr: u32,
    pub dfr: u32,
    pub hardware_enabled: bool,
    pub x2apic: bool,
    pub software_enabled: bool,
}

impl Address {
    fn is_broadcast(&self, destination: u32) -> bool {
        destination == if self.x2apic { X2APIC_BROADCAST } else { XAPIC_BROADCAST }
    }

    fn matches_physical(&self, destination: u32) -> bool {
        // An identity that 8 bits cannot hold belongs to a processor that is still in xAPIC mode
        // after hot-plug: it answers to its initial identity.
        if self.x2apic || destination > 0xff {
            destination == self.initial_id
        } else {
            destination == u32::from(self.xapic_id)
        }
    }

    fn matches_logical(&self, destination: u32) -> bool {
        if self.x2apic {
            return self.ldr >> 16 == destination >> 16 && self.ldr & destination & 0xffff != 0;
        }
        let logical_id = self.ldr >> 24;
        match self.dfr >> 28 {
            DFR_MODEL_FLAT => logical_id & destination & 0xff != 0,
            DFR_MODEL_CLUSTER => logical_id >> 4 == (destination >> 4) & 0xffff && logical_id & destination & 0xf != 0,
            _ => false,
        }
    }

    /// Whether `message` is for this local APIC.
    pub(crate) fn matches(&self, message: &Message, xapic_broadcast: bool) -> bool {
        let destination = if xapic_broadcast && self.x2apic && message.destination == XAPIC_BROADCAST {
            X2APIC_BROADCAST
        } else {
            message.destination
        };
        if self.is_broadcast(destination) {
            return true;
        }
        if message.logical {
            self.matches_logical(destination)
        } else {
            self.matches_physical(destination)
        }
    }
}

/// Hands `message` to every local APIC in `lapics` that it is addressed to.
///
/// `xapic_broadcast` lets destination 0xff reach APICs in x2APIC mode too, which is right for
/// devices and wrong for IPIs. Returns how many took it, or -1 where nobody was addressed.
pub(crate) fn deliver(lapics: &[Arc<LapicCell>], message: &Message, xapic_broadcast: bool) -> i32 {
    let addressed = |cell: &&Arc<LapicCell>| {
        let address = cell.address();
        address.hardware_enabled && address.matches(message, xapic_broadcast)
    };
    if message.goes_to_one() {
        let candidate = |cell: &&Arc<LapicCell>| addressed(cell) && cell.address().software_enabled;
        let count = lapics.iter().filter(candidate).count();
        let Some(index) = usize::from(message.vector).checked_rem(count) else {
            return -1;
        };
        // The set can shrink between the two passes; then nobody takes it, as on a machine whose
        // processor has just disabled its APIC.
        return match lapics.iter().filter(candidate).nth(index) {
            Some(cell) => i32::from(cell.accept(message)),
            None => -1,
        };
    }
    let mut result = -1;
    for cell in lapics.iter().filter(addressed) {
        result = result.max(0) + i32::from(cell.accept(message));
    }
    result
}

/// Sends an IPI from the processor `source`.
pub(crate) fn send_ipi(lapics: &[Arc<LapicCell>], source: u32, ipi: &Ipi) {
    let selected = |cell: &&Arc<LapicCell>| match ipi.shorthand {
        Shorthand::None => false,
        Shorthand::ToSelf => cell.vcpu() == source,
        Shorthand::All => true,
        Shorthand::AllButSelf => cell.vcpu() != source,
    };
    if ipi.shorthand == Shorthand::None {
        deliver(lapics, &ipi.message, false);
        return;
    }
    for cell in lapics.iter().filter(selected) {
        if cell.address().hardware_enabled {
            cell.accept(&ipi.message);
        }
    }
}

/// Targets of the hypercall KVM_HC_SEND_IPI.
pub(crate) struct PvIpi {
    /// Bit n stands for APIC ID `min` + n.
    pub bitmap: [u64; 2],
    /// Bits in use in each word: 64, or 32 outside 64-bit mode.
    pub bits_per_word: u32,
    pub min: u32,
}

impl PvIpi {
    fn names(&self, id: u32) -> bool {
        let Some(offset) = id.checked_sub(self.min) else {
            return false;
        };
        let bits = self.bits_per_word.clamp(1, 64);
        let word = self.bitmap.get((offset / bits) as usize);
        word.is_some_and(|word| word & 1 << (offset % bits) != 0)
    }
}

/// Sends a paravirtual IPI. Returns how many APICs were reached, or `None` for an ICR that names
/// its destination otherwise.
pub(crate) fn send_pv_ipi(lapics: &[Arc<LapicCell>], targets: &PvIpi, icr: u32) -> Option<u64> {
    let ipi = Ipi::from_icr(icr, 0);
    if ipi.message.logical || ipi.shorthand != Shorthand::None {
        return None;
    }
    let mut reached = 0;
    for cell in lapics.iter().filter(|cell| targets.names(cell.vcpu())) {
        if cell.address().hardware_enabled {
            cell.accept(&ipi.message);
            reached += 1;
        }
    }
    Some(reached)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(destination: u32, logical: bool) -> Message {
        Message {
            vector: 0x40,
            mode: DeliveryMode::Fixed,
            level: false,
            assert: true,
            logical,
            destination,
            redirection_hint: false,
        }
    }

    fn xapic(id: u8, logical_id: u8, dfr: u32) -> Address {
        Address {
            initial_id: id.into(),
            xapic_id: id,
            ldr: u32::from(logical_id) << 24,
            dfr,
            hardware_enabled: true,
            x2apic: false,
            software_enabled: true,
        }
    }

    #[test]
    fn test_physical_match_by_mode_uses_the_right_identity() {
        let mut address = xapic(3, 0, !0);
        assert!(address.matches(&message(3, false), false));
        assert!(address.matches(&message(0xff, false), false));
        assert!(!address.matches(&message(X2APIC_BROADCAST, false), false));
        address.x2apic = true;
        assert!(address.matches(&message(X2APIC_BROADCAST, false), false));
        assert!(!address.matches(&message(0xff, false), false));
        assert!(address.matches(&message(0xff, false), true));
    }

    #[test]
    fn test_logical_match_flat_is_a_bit_mask() {
        let address = xapic(0, 0x04, !0);
        assert!(address.matches(&message(0x0c, true), false));
        assert!(!address.matches(&message(0x03, true), false));
    }

    #[test]
    fn test_logical_match_cluster_compares_cluster_then_mask() {
        let address = xapic(0, 0x24, 0x0fff_ffff);
        assert!(address.matches(&message(0x2c, true), false));
        assert!(!address.matches(&message(0x1c, true), false));
        assert!(!address.matches(&message(0x23, true), false));
    }

    #[test]
    fn test_logical_match_x2apic_compares_upper_half() {
        let mut address = xapic(0x21, 0, !0);
        address.x2apic = true;
        address.ldr = 0x0002_0002;
        assert!(address.matches(&message(0x0002_0003, true), false));
        assert!(!address.matches(&message(0x0001_0003, true), false));
    }

    #[test]
    fn test_msi_decode_wide_takes_upper_destination() {
        let narrow = Message::from_msi(0x0000_0100_fee0_5000, 0x8041, false);
        assert_eq!(narrow.destination, 5);
        assert!(narrow.level);
        assert_eq!(narrow.vector, 0x41);
        let wide = Message::from_msi(0x0000_0100_fee0_500c, 0x0141, true);
        assert_eq!(wide.destination, 0x105);
        assert!(wide.logical && wide.redirection_hint);
        assert_eq!(wide.mode, DeliveryMode::LowestPriority);
    }
}
