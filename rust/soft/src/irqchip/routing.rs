//! GSI routing: which chips' pins, or which MSI, a global system interrupt is wired to.
//!
//! The default is KVM's for x86: GSI n is pin n of the IOAPIC, and up to 15 also input n of the
//! PICs. A PC wires ISA interrupt 0 to IOAPIC pin 2; as with KVM, the VMM says so with its own
//! table (KVM_SET_GSI_ROUTING).

use super::ioapic::PINS;
use super::IrqError;
use kvm_bindings::{
    kvm_irq_routing_entry, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
};

/// KVM's limit on GSI numbers and on entries.
pub(crate) const MAX_GSIS: u32 = 4096;
/// KVM_MSI_VALID_DEVID, the one flag an entry may have; x86 has no use for device ids.
const FLAG_MSI_DEVICE_ID: u32 = 1;
/// Inputs of one 8259.
const PIC_PINS: u32 = 8;
const CHIPS: usize = 3;

/// What one GSI is wired to: at most one pin of each chip, or one MSI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Pin of PIC master, PIC slave, IOAPIC, indexed by KVM_IRQCHIP_*.
    pins: [Option<u8>; CHIPS],
    /// Address and data.
    pub msi: Option<(u64, u32)>,
}

impl Targets {
    /// The PIC inputs, 0 to 15.
    pub(crate) fn pic_inputs(&self) -> impl Iterator<Item = u8> {
        let slave = self.pins[KVM_IRQCHIP_PIC_SLAVE as usize].map(|pin| pin + 8);
        self.pins[KVM_IRQCHIP_PIC_MASTER as usize].into_iter().chain(slave)
    }

    pub(crate) fn ioapic_pin(&self) -> Option<u8> {
        self.pins[KVM_IRQCHIP_IOAPIC as usize]
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The routing table, with the way back from a pin to its GSI.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routing {
    targets: Vec<Targets>,
    gsi_of_pin: [[Option<u32>; PINS]; CHIPS],
}

impl Routing {
    /// KVM's table after KVM_CREATE_IRQCHIP.
    pub(crate) fn default_x86() -> Self {
        let mut routing = Self::default();
        for gsi in 0..PINS as u32 {
            routing.wire(gsi, KVM_IRQCHIP_IOAPIC, gsi);
            if gsi < 2 * PIC_PINS {
                let chip = KVM_IRQCHIP_PIC_MASTER + gsi / PIC_PINS;
                routing.wire(gsi, chip, gsi % PIC_PINS);
            }
        }
        routing
    }

    /// Builds a table from KVM_SET_GSI_ROUTING's entries.
    pub(crate) fn from_entries(entries: &[kvm_irq_routing_entry], wide_destination: bool) -> Result<Self, IrqError> {
        if entries.len() > MAX_GSIS as usize {
            let reason = "the table has more than 4096 entries";
            return Err(IrqError::Routing { gsi: 0, reason });
        }
        let mut routing = Self::default();
        for entry in entries {
            routing.add(entry, wide_destination).map_err(|reason| IrqError::Routing { gsi: entry.gsi, reason })?;
        }
        Ok(routing)
    }

    fn add(&mut self, entry: &kvm_irq_routing_entry, wide: bool) -> Result<(), &'static str> {
        if entry.gsi >= MAX_GSIS {
            return Err("the GSI is above 4095");
        }
        match entry.type_ {
            KVM_IRQ_ROUTING_IRQCHIP => self.add_pin(entry),
            KVM_IRQ_ROUTING_MSI => self.add_msi(entry, wide),
            _ => Err("the type is neither an irqchip pin nor an MSI"),
        }
    }

    fn add_pin(&mut self, entry: &kvm_irq_routing_entry) -> Result<(), &'static str> {
        // SAFETY: every member of the union is plain integers, any bytes are valid.
        let (chip, pin) = unsafe { (entry.u.irqchip.irqchip, entry.u.irqchip.pin) };
        let pins = match chip {
            KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE => PIC_PINS,
            KVM_IRQCHIP_IOAPIC => PINS as u32,
            _ => return Err("there is no such irqchip"),
        };
        if pin >= pins {
            return Err("the irqchip has no such pin");
        }
        if entry.flags != 0 {
            return Err("a pin's entry has no flags");
        }
        let targets = self.targets(entry.gsi);
        if targets.msi.is_some() || targets.pins[chip as usize].is_some() {
            return Err("the GSI is wired to this chip or to an MSI already");
        }
        self.wire(entry.gsi, chip, pin);
        Ok(())
    }

    fn add_msi(&mut self, entry: &kvm_irq_routing_entry, wide: bool) -> Result<(), &'static str> {
        // SAFETY: every member of the union is plain integers, any bytes are valid.
        let msi = unsafe { entry.u.msi };
        if entry.flags & !FLAG_MSI_DEVICE_ID != 0 {
            return Err("unknown flags");
        }
        if wide && msi.address_hi & 0xff != 0 {
            return Err("the low byte of the MSI's upper address must be 0");
        }
        if !self.targets(entry.gsi).is_empty() {
            return Err("the GSI is wired already");
        }
        let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
        self.targets_mut(entry.gsi).msi = Some((address, msi.data));
        Ok(())
    }

    fn targets_mut(&mut self, gsi: u32) -> &mut Targets {
        let index = gsi as usize;
        if self.targets.len() <= index {
            self.targets.resize(index + 1, Targets::default());
        }
        &mut self.targets[index]
    }

    fn wire(&mut self, gsi: u32, chip: u32, pin: u32) {
        self.targets_mut(gsi).pins[chip as usize] = Some(pin as u8);
        self.gsi_of_pin[chip as usize][pin as usize] = Some(gsi);
    }

    /// What `gsi` is wired to; nothing for one that is unknown.
    pub(crate) fn targets(&self, gsi: u32) -> Targets {
        self.targets.get(gsi as usize).copied().unwrap_or_default()
    }

    /// The GSI wired to an IOAPIC pin.
    pub(crate) fn gsi_of_ioapic_pin(&self, pin: u8) -> Option<u32> {
        self.gsi_of_pin[KVM_IRQCHIP_IOAPIC as usize][usize::from(pin)]
    }

    /// The GSI wired to PIC input 0 to 15.
    pub(crate) fn gsi_of_pic_input(&self, input: u8) -> Option<u32> {
        self.gsi_of_pin[usize::from(input >> 3)][usize::from(input & 7)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin_entry(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = pin;
        entry
    }

    fn msi_entry(gsi: u32, address_hi: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi.address_lo = 0xfee0_1000;
        entry.u.msi.address_hi = address_hi;
        entry.u.msi.data = 0x41;
        entry
    }

    #[test]
    fn test_default_table_wires_pic_and_ioapic_as_kvm() {
        let routing = Routing::default_x86();
        assert_eq!(routing.targets(0).ioapic_pin(), Some(0));
        assert_eq!(routing.targets(0).pic_inputs().collect::<Vec<_>>(), [0]);
        assert_eq!(routing.targets(9).pic_inputs().collect::<Vec<_>>(), [9]);
        assert_eq!(routing.targets(16).pic_inputs().count(), 0);
        assert_eq!(routing.targets(23).ioapic_pin(), Some(23));
        assert_eq!(routing.targets(24), Targets::default());
        assert_eq!(routing.gsi_of_pic_input(12), Some(12));
    }

    #[test]
    fn test_from_entries_timer_override_maps_both_ways() {
        let entries = [pin_entry(0, 0, 0), pin_entry(0, 2, 2), msi_entry(24, 0)];
        let routing = Routing::from_entries(&entries, false).unwrap();
        assert_eq!(routing.targets(0).ioapic_pin(), Some(2));
        assert_eq!(routing.gsi_of_ioapic_pin(2), Some(0));
        assert_eq!(routing.targets(24).msi, Some((0xfee0_1000, 0x41)));
        assert_eq!(routing.targets(1), Targets::default());
    }

    #[test]
    fn test_from_entries_bad_entry_is_refused() {
        let mut flagged = pin_entry(3, 2, 3);
        flagged.flags = 1;
        let mut unknown = pin_entry(3, 2, 3);
        unknown.type_ = 77;
        let bad: [&[kvm_irq_routing_entry]; 8] = [
            &[pin_entry(4096, 2, 0)],
            &[pin_entry(3, 2, 24)],
            &[pin_entry(3, 1, 8)],
            &[pin_entry(3, 3, 0)],
            &[pin_entry(3, 2, 3), pin_entry(3, 2, 4)],
            &[pin_entry(3, 2, 3), msi_entry(3, 0)],
            &[flagged],
            &[unknown],
        ];
        for entries in bad {
            assert!(Routing::from_entries(entries, false).is_err());
        }
        assert!(Routing::from_entries(&[msi_entry(3, 1)], true).is_err());
    }
}
