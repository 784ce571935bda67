//! 82093AA IOAPIC with 24 pins, as KVM models it.
//!
//! Polarity is stored and ignored (a line's level is logical), there is no EOI register
//! (version 0x11), reserved bits of the redirection entries hold what is written. Messages go
//! out through a callback, called with this chip's lock held.

use super::delivery::{DeliveryMode, Message};
use super::IrqError;
use kvm_bindings::kvm_ioapic_state;

/// Interrupt inputs.
pub(crate) const PINS: usize = 24;
/// Where the register window lies; it cannot be moved.
pub(crate) const BASE: u64 = 0xfec0_0000;
/// Size of the register window.
pub(crate) const SIZE: u64 = 0x100;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_REDIRECTION: u8 = 0x10;

const VERSION: u32 = ((PINS as u32 - 1) << 16) | 0x11;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const LOGICAL: u64 = 1 << 11;

/// Sends a message to the local APICs; returns how many took it, or -1 if nobody was addressed.
pub(crate) type Deliver<'a> = &'a mut dyn FnMut(&Message) -> i32;

/// The IOAPIC.
#[derive(Clone, Debug)]
pub(crate) struct IoApic {
    id: u8,
    select: u8,
    /// Level of each pin, all of its sources together.
    lines: u32,
    /// Which sources hold each pin up.
    sources: [u8; PINS],
    redirection: [u64; PINS],
}

impl IoApic {
    pub(crate) fn new() -> Self {
        Self { id: 0, select: 0, lines: 0, sources: [0; PINS], redirection: [MASKED; PINS] }
    }

    /// A load from the window.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & 0xff {
            IOREGSEL => self.select.into(),
            IOWIN => self.read_selected(),
            _ => 0,
        };
        let bytes = u64::from(value).to_le_bytes();
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => u32::from(self.id) << 24,
            REG_VERSION => VERSION,
            select => match self.redirection.get(Self::pin_of(select)) {
                Some(entry) if select & 1 != 0 => (entry >> 32) as u32,
                Some(entry) => *entry as u32,
                None => !0,
            },
        }
    }

    fn pin_of(select: u8) -> usize {
        usize::from(select.wrapping_sub(REG_REDIRECTION) >> 1)
    }

    /// A store to the window. Returns the pin that became unmasked, if one did.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], deliver: Deliver) -> Option<u8> {
        let mut bytes = [0; 4];
        let length = data.len().min(4);
        bytes[..length].copy_from_slice(&data[..length]);
        let value = u32::from_le_bytes(bytes);
        match offset & 0xff {
            IOREGSEL => self.select = value as u8,
            IOWIN => return self.write_selected(value, deliver),
            _ => (),
        }
        None
    }

    fn write_selected(&mut self, value: u32, deliver: Deliver) -> Option<u8> {
        if self.select == REG_ID {
            self.id = (value >> 24) as u8 & 0xf;
            return None;
        }
        let pin = Self::pin_of(self.select);
        let old = *self.redirection.get(pin)?;
        let read_only = REMOTE_IRR | DELIVERY_STATUS;
        let mut entry = if self.select & 1 != 0 {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & (!0xffff_ffff | read_only) | u64::from(value) & !read_only
        };
        if entry & LEVEL == 0 {
            // Systems without an EOI register end a stuck interrupt by switching to edge and back.
            entry &= !REMOTE_IRR;
        }
        self.redirection[pin] = entry;
        if entry & LEVEL != 0 && self.lines & (1 << pin) != 0 {
            self.service(pin, deliver);
        }
        (old & MASKED != 0 && entry & MASKED == 0).then_some(pin as u8)
    }

    /// A source changes its contribution to `pin`. Returns how many APICs took an interrupt, 0
    /// for an edge that merged with an earlier one, -1 for one that was masked.
    pub(crate) fn set_line(&mut self, pin: u8, source: u8, level: bool, deliver: Deliver) -> i32 {
        let index = usize::from(pin);
        let Some(sources) = self.sources.get_mut(index) else {
            return -1;
        };
        if level {
            *sources |= source;
        } else {
            *sources &= !source;
        }
        let bit = 1 << index;
        if *sources == 0 {
            self.lines &= !bit;
            return 1;
        }
        let was_up = self.lines & bit != 0;
        self.lines |= bit;
        if was_up && self.redirection[index] & LEVEL == 0 {
            return 0;
        }
        self.service(index, deliver)
    }

    /// Sends the pin's message, unless it is masked or an earlier level one is not ended.
    fn service(&mut self, pin: usize, deliver: Deliver) -> i32 {
        let entry = self.redirection[pin];
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 || level && entry & REMOTE_IRR != 0 {
            return -1;
        }
        let taken = deliver(&Message {
            vector: entry as u8,
            mode: DeliveryMode::from_field((entry >> 8) as u32),
            level,
            assert: true,
            logical: entry & LOGICAL != 0,
            destination: (entry >> 56) as u32,
            redirection_hint: false,
        });
        // A level message nobody took must not wait for an EOI that will never come.
        if level && taken > 0 {
            self.redirection[pin] |= REMOTE_IRR;
        }
        taken
    }

    /// Bit mask of the pins that deliver `vector`.
    pub(crate) fn pins_with(&self, vector: u8) -> u32 {
        let matches = |pin: &usize| self.redirection[*pin] as u8 == vector;
        (0..PINS).filter(matches).fold(0, |pins, pin| pins | 1 << pin)
    }

    /// A local APIC ended a level interrupt: pins whose line is still up interrupt again.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8, pins: u32, deliver: Deliver) {
        for pin in 0..PINS {
            let entry = &mut self.redirection[pin];
            if pins & (1 << pin) == 0 || *entry as u8 != vector || *entry & LEVEL == 0 {
                continue;
            }
            *entry &= !REMOTE_IRR;
            if self.lines & (1 << pin) != 0 {
                self.service(pin, deliver);
            }
        }
    }

    /// The vectors of all pins, to be told of their EOIs.
    pub(crate) fn vectors(&self) -> [u64; 4] {
        let mut set = [0; 4];
        for entry in self.redirection {
            let vector = entry as u8;
            set[usize::from(vector >> 6)] |= 1 << (vector & 63);
        }
        set
    }

    /// KVM_GET_IRQCHIP.
    pub(crate) fn state(&self) -> kvm_ioapic_state {
        let mut state = kvm_ioapic_state {
            base_address: BASE,
            ioregsel: self.select.into(),
            id: self.id.into(),
            irr: self.lines,
            ..Default::default()
        };
        for (slot, entry) in state.redirtbl.iter_mut().zip(self.redirection) {
            slot.bits = entry;
        }
        state
    }

    /// KVM_SET_IRQCHIP. Who holds a line up is not part of the state, as with KVM: a line that was
    /// up stays so until a device lowers it. Pins whose line is up interrupt again if nothing
    /// forbids.
    pub(crate) fn set_state(&mut self, state: &kvm_ioapic_state, deliver: Deliver) -> Result<(), IrqError> {
        let invalid = |reason| IrqError::InvalidState { chip: "IOAPIC", reason };
        if state.base_address != BASE {
            return Err(invalid("the base address is not 0xfec0_0000"));
        }
        if state.ioregsel > 0xff || state.id > 0xf || state.irr >> PINS != 0 {
            return Err(invalid("ioregsel, id or irr is out of range"));
        }
        self.select = state.ioregsel as u8;
        self.id = state.id as u8;
        self.lines = 0;
        for (entry, slot) in self.redirection.iter_mut().zip(&state.redirtbl) {
            // SAFETY: both members of the union are plain integers, any bytes are valid.
            *entry = unsafe { slot.bits };
        }
        for pin in (0..PINS).filter(|pin| state.irr & (1 << pin) != 0) {
            self.lines |= 1 << pin;
            self.service(pin, deliver);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "ioapic_tests.rs"]
mod tests;
