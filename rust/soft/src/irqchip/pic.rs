//! The PC's two 8259A interrupt controllers with their edge/level control registers.
//!
//! Intel's 8259A data sheet; ELCR as in the 82371 (PIIX). The slave's output is wired to the
//! master's input 2 and followed as a level, which is what the wire does. Left out, as in KVM:
//! single mode, MCS-80 mode, the buffered modes and the level mode bit of ICW1 (ELCR rules).

use super::IrqError;
use kvm_bindings::kvm_pic_state;

/// Where the slave hangs on the master.
const CASCADE: u8 = 2;
/// What an interrupt that vanished before its acknowledgement is reported as.
const SPURIOUS: u8 = 7;
/// Inputs whose trigger mode ELCR may change: not timer, keyboard, cascade; not RTC, coprocessor.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

const ICW1: u8 = 1 << 4;
const ICW1_IC4: u8 = 1 << 0;
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_SPECIAL_FULLY_NESTED: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;

/// One 8259A.
#[derive(Clone, Debug, Default)]
struct Chip {
    /// Levels of the inputs as last seen, for edge detection.
    levels: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// The input with the highest priority; the others follow cyclically.
    top: u8,
    vector_base: u8,
    reads_isr: bool,
    polls: bool,
    special_mask: bool,
    /// Initialisation step expected next: 0 none, 1 ICW2, 2 ICW3, 3 ICW4.
    init_step: u8,
    expects_icw4: bool,
    auto_eoi: bool,
    rotates_on_auto_eoi: bool,
    special_fully_nested: bool,
    elcr: u8,
    elcr_mask: u8,
}

impl Chip {
    /// Position in the priority order of the best input in `set`, 0 the highest, 8 for none.
    fn rank(&self, set: u8) -> u32 {
        set.rotate_right(self.top.into()).trailing_zeros()
    }

    fn input_of(&self, rank: u32) -> u8 {
        (rank as u8).wrapping_add(self.top) & 7
    }

    /// The input that makes the chip raise INT, if any does.
    fn pending(&self, master: bool) -> Option<u8> {
        let requested = self.rank(self.irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && master {
            // A slave that is being served may interrupt again with something more urgent.
            in_service &= !(1 << CASCADE);
        }
        (requested < self.rank(in_service)).then(|| self.input_of(requested))
    }

    /// Returns false if the rise merged with one that is still waiting.
    fn set_input(&mut self, input: u8, level: bool) -> bool {
        let bit = 1 << input;
        let was_waiting = self.irr & bit != 0;
        let rises = level && self.levels & bit == 0;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if rises {
            self.irr |= bit;
        }
        self.levels = if level { self.levels | bit } else { self.levels & !bit };
        !level || !was_waiting
    }

    /// The CPU acknowledges `input`. Returns the input if that ended it at once (automatic EOI).
    fn acknowledge(&mut self, input: u8) -> Option<u8> {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
            return None;
        }
        if self.rotates_on_auto_eoi {
            self.top = (input + 1) & 7;
        }
        Some(input)
    }

    /// ICW1. Returns the inputs whose service this cut short.
    fn initialise(&mut self, icw1: u8) -> u8 {
        let ended = self.isr;
        *self = Self {
            levels: self.levels,
            irr: self.irr & self.elcr,
            init_step: 1,
            expects_icw4: icw1 & ICW1_IC4 != 0,
            vector_base: self.vector_base,
            elcr: self.elcr,
            elcr_mask: self.elcr_mask,
            ..Self::default()
        };
        ended
    }

    /// A store to the odd port: an initialisation word, or the mask.
    fn write_data(&mut self, value: u8) {
        match self.init_step {
            1 => {
                self.vector_base = value & 0xf8;
                self.init_step = 2;
            }
            2 => self.init_step = if self.expects_icw4 { 3 } else { 0 },
            3 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.special_fully_nested = value & ICW4_SPECIAL_FULLY_NESTED != 0;
                self.init_step = 0;
            }
            _ => self.imr = value,
        }
    }

    /// A store to the even port. Returns the inputs whose service ended.
    fn write_command(&mut self, value: u8) -> u8 {
        if value & ICW1 != 0 {
            return self.initialise(value);
        }
        if value & OCW3 != 0 {
            self.write_ocw3(value);
            return 0;
        }
        self.write_ocw2(value)
    }

    fn write_ocw3(&mut self, value: u8) {
        self.polls = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.reads_isr = value & 0x01 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    /// OCW2: rotation and end of interrupt. Returns the input that ended, as a bit.
    fn write_ocw2(&mut self, value: u8) -> u8 {
        let rotate = value & 0x80 != 0;
        let specific = value & 0x40 != 0;
        let eoi = value & 0x20 != 0;
        let named = value & 7;
        match (eoi, specific) {
            (false, false) => {
                self.rotates_on_auto_eoi = rotate;
                0
            }
            (false, true) => {
                if rotate {
                    self.top = (named + 1) & 7;
                }
                0
            }
            (true, true) => self.end(named, rotate),
            (true, false) => {
                // In special mask mode a non-specific EOI passes over what is masked.
                let served = self.isr & if self.special_mask { !self.imr } else { !0 };
                let rank = self.rank(served);
                if rank == 8 {
                    return 0;
                }
                self.end(self.input_of(rank), rotate)
            }
        }
    }

    fn end(&mut self, input: u8, rotate: bool) -> u8 {
        let ended = self.isr & 1 << input;
        self.isr &= !(1 << input);
        if rotate {
            self.top = (input + 1) & 7;
        }
        ended
    }
}

/// Both 8259As, wired as in a PC. Inputs are numbered 0 to 15.
#[derive(Clone, Debug)]
pub(crate) struct Pic {
    /// Master, slave.
    chips: [Chip; 2],
    /// Which sources hold each input up.
    sources: [u8; 16],
}

impl Pic {
    pub(crate) fn new() -> Self {
        let chip = |elcr_mask| Chip { elcr_mask, ..Chip::default() };
        Self { chips: ELCR_MASKS.map(chip), sources: [0; 16] }
    }

    /// The ports this chip answers to.
    pub(crate) fn decodes(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    /// Level of the master's INT output.
    pub(crate) fn output(&self) -> bool {
        self.chips[0].pending(true).is_some()
    }

    /// Whether the mask holds back input 0, the timer's.
    pub(crate) fn masks_timer(&self) -> bool {
        self.chips[0].imr & 1 != 0
    }

    fn follow_cascade(&mut self) {
        let slave = self.chips[1].pending(false).is_some();
        let master = &mut self.chips[0];
        let bit = 1 << CASCADE;
        master.levels = master.levels & !bit | u8::from(slave) << CASCADE;
        master.irr = master.irr & !bit | u8::from(slave) << CASCADE;
    }

    /// A source changes its contribution to `input`. Returns 1 if that counted, 0 if it merged
    /// with an interrupt that waits already, -1 if the input is masked.
    pub(crate) fn set_line(&mut self, input: u8, source: u8, level: bool) -> i32 {
        let Some(sources) = self.sources.get_mut(usize::from(input)) else {
            return -1;
        };
        if level {
            *sources |= source;
        } else {
            *sources &= !source;
        }
        let up = *sources != 0;
        let chip = &mut self.chips[usize::from(input >> 3)];
        let pin = input & 7;
        if input == CASCADE {
            return -1;
        }
        let counted = chip.set_input(pin, up);
        let masked = chip.imr & 1 << pin != 0;
        self.follow_cascade();
        if masked {
            -1
        } else {
            counted.into()
        }
    }

    /// The interrupt acknowledge cycle. Returns the vector, and as bits the inputs that ended.
    pub(crate) fn acknowledge(&mut self) -> (u8, u16) {
        let mut ended = 0;
        let vector = match self.chips[0].pending(true) {
            None => self.chips[0].vector_base + SPURIOUS,
            Some(CASCADE) => {
                ended |= bit16(self.chips[0].acknowledge(CASCADE), 0);
                self.acknowledge_slave(&mut ended)
            }
            Some(input) => {
                ended |= bit16(self.chips[0].acknowledge(input), 0);
                self.chips[0].vector_base + input
            }
        };
        self.follow_cascade();
        (vector, ended)
    }

    fn acknowledge_slave(&mut self, ended: &mut u16) -> u8 {
        let slave = &mut self.chips[1];
        match slave.pending(false) {
            Some(input) => {
                *ended |= bit16(slave.acknowledge(input), 8);
                slave.vector_base + input
            }
            None => slave.vector_base + SPURIOUS,
        }
    }

    /// A byte read from `port`, and as bits the inputs that ended by it (poll with automatic EOI).
    pub(crate) fn read(&mut self, port: u16) -> (u8, u16) {
        let result = match port {
            0x20 | 0x21 => self.read_chip(0, port & 1 != 0),
            0xa0 | 0xa1 => self.read_chip(1, port & 1 != 0),
            0x4d0 => (self.chips[0].elcr, 0),
            0x4d1 => (self.chips[1].elcr, 0),
            _ => (0xff, 0),
        };
        self.follow_cascade();
        result
    }

    fn read_chip(&mut self, index: usize, data_port: bool) -> (u8, u16) {
        let chip = &mut self.chips[index];
        if std::mem::take(&mut chip.polls) {
            let Some(input) = chip.pending(index == 0) else {
                return (0, 0);
            };
            let ended = bit16(chip.acknowledge(input), 8 * index as u32);
            return (0x80 | input, ended);
        }
        let value = match (data_port, chip.reads_isr) {
            (true, _) => chip.imr,
            (false, true) => chip.isr,
            (false, false) => chip.irr,
        };
        (value, 0)
    }

    /// A byte written to `port`. Returns as bits the inputs whose service ended.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> u16 {
        let mut ended = 0;
        match port {
            0x20 => ended = self.chips[0].write_command(value).into(),
            0x21 => self.chips[0].write_data(value),
            0xa0 => ended = u16::from(self.chips[1].write_command(value)) << 8,
            0xa1 => self.chips[1].write_data(value),
            0x4d0 | 0x4d1 => {
                let chip = &mut self.chips[usize::from(port & 1)];
                chip.elcr = value & chip.elcr_mask;
            }
            _ => (),
        }
        self.follow_cascade();
        ended & !(1 << CASCADE)
    }

    /// KVM_GET_IRQCHIP of the master (0) or slave (1).
    pub(crate) fn state(&self, index: usize) -> kvm_pic_state {
        let chip = &self.chips[index & 1];
        kvm_pic_state {
            last_irr: chip.levels,
            irr: chip.irr,
            imr: chip.imr,
            isr: chip.isr,
            priority_add: chip.top,
            irq_base: chip.vector_base,
            read_reg_select: chip.reads_isr.into(),
            poll: chip.polls.into(),
            special_mask: chip.special_mask.into(),
            init_state: chip.init_step,
            auto_eoi: chip.auto_eoi.into(),
            rotate_on_auto_eoi: chip.rotates_on_auto_eoi.into(),
            special_fully_nested_mode: chip.special_fully_nested.into(),
            init4: chip.expects_icw4.into(),
            elcr: chip.elcr,
            elcr_mask: chip.elcr_mask,
        }
    }

    /// KVM_SET_IRQCHIP of the master (0) or slave (1). Who holds a line up is not part of the
    /// state, as with KVM.
    pub(crate) fn set_state(&mut self, index: usize, state: &kvm_pic_state) -> Result<(), IrqError> {
        let index = index & 1;
        if state.priority_add > 7 || state.init_state > 3 {
            let reason = "priority_add above 7 or init_state above 3";
            return Err(IrqError::InvalidState { chip: "PIC", reason });
        }
        self.chips[index] = Chip {
            levels: state.last_irr,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            top: state.priority_add,
            vector_base: state.irq_base & 0xf8,
            reads_isr: state.read_reg_select != 0,
            polls: state.poll != 0,
            special_mask: state.special_mask != 0,
            init_step: state.init_state,
            expects_icw4: state.init4 != 0,
            auto_eoi: state.auto_eoi != 0,
            rotates_on_auto_eoi: state.rotate_on_auto_eoi != 0,
            special_fully_nested: state.special_fully_nested_mode != 0,
            elcr: state.elcr & ELCR_MASKS[index],
            elcr_mask: ELCR_MASKS[index],
        };
        self.follow_cascade();
        Ok(())
    }
}

/// Input `input` of the chip whose first input is `first`, as a bit; the cascade is no input.
fn bit16(input: Option<u8>, first: u32) -> u16 {
    match input {
        Some(input) if first != 0 || input != CASCADE => 1 << (u32::from(input) + first),
        _ => 0,
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;
