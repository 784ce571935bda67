//! Events: which exception, interrupt or NMI is delivered when, and what becomes of a fault during
//! its delivery.
//!
//! SDM vol. 3, 6.5-6.15. `interrupt.rs` enters the handler; this file has what the main loop
//! calls. Every entry leaves RIP at a handler, or returns [`Stop::Exit`] with [`Exit::Shutdown`]
//! after a triple fault.

use super::{vector, Cpu, Exit, Fault, Stop, R};

/// Where an event comes from; decides the EXT bit and the gate's privilege check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A processor exception.
    Exception,
    /// INT n.
    IntN,
    /// INT3, INTO.
    Trap,
    /// INT1: a software exception without a privilege check.
    Int1,
    /// The interrupt controllers, or an NMI.
    External,
}

/// An event under delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its vector.
    pub vector: u8,
    /// The error code it pushes.
    pub error: Option<u32>,
    /// CR2 or DR6 bits, as in [`Fault`].
    pub payload: u64,
    /// Its origin.
    pub source: Source,
}

impl Event {
    /// An event without error code.
    pub fn plain(vector: u8, source: Source) -> Self {
        Self { vector, error: None, payload: 0, source }
    }

    /// INT n, INT3, INTO: the gate's DPL must allow it.
    pub fn software(&self) -> bool {
        matches!(self.source, Source::IntN | Source::Trap)
    }

    /// The EXT bit of error codes that its delivery causes.
    pub fn ext(&self) -> u32 {
        !self.software() as u32
    }

    /// The pushed RFLAGS image has RF set, so that the instruction's breakpoint does not hit again:
    /// every fault but an instruction breakpoint's #DB. SDM vol. 3, 17.3.1.1.
    pub fn sets_rf(&self) -> bool {
        let trap = matches!(self.vector, vector::DB | vector::BP | vector::OF | vector::DF | 18);
        self.source == Source::Exception && !trap
    }
}

impl From<Fault> for Event {
    fn from(fault: Fault) -> Self {
        Self { vector: fault.vector, error: fault.error, payload: fault.payload, source: Source::Exception }
    }
}

/// SDM vol. 3, table 6-5.
#[derive(PartialEq, Eq)]
enum Severity {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn severity(event: &Event) -> Severity {
    if event.source != Source::Exception {
        return Severity::Benign;
    }
    match event.vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Severity::Contributory,
        vector::PF => Severity::PageFault,
        vector::DF => Severity::DoubleFault,
        _ => Severity::Benign,
    }
}

/// What to deliver when `second` happened during the delivery of `first`; `None`: shutdown.
fn combine(first: &Event, second: Event) -> Option<Event> {
    let double = match (severity(first), severity(&second)) {
        (Severity::DoubleFault, Severity::Contributory | Severity::PageFault) => return None,
        (Severity::Contributory, Severity::Contributory) => true,
        (Severity::PageFault, Severity::Contributory | Severity::PageFault) => true,
        _ => false,
    };
    let fault = Fault { vector: vector::DF, error: Some(0), payload: 0 };
    Some(if double { fault.into() } else { second })
}

/// Faults in a row on the way to a handler before the main loop has its turn.
const MAX_SERIAL_FAULTS: u32 = 8;

impl Cpu {
    /// Delivers the exception in `self.fault`; RIP is that of the instruction to return to.
    pub fn deliver_fault(&mut self) -> R {
        self.deliver(self.fault.into())
    }

    /// Delivers an external interrupt that was accepted from the board.
    pub fn deliver_interrupt(&mut self, vector: u8) -> R {
        self.deliver(Event::plain(vector, Source::External))
    }

    /// Delivers an NMI and holds off further ones until IRET.
    pub fn deliver_nmi(&mut self) -> R {
        self.nmi_blocked = true;
        self.deliver(Event::plain(vector::NMI, Source::External))
    }

    /// Delivers an interrupt that user space injected: an external one, or an INT n's.
    pub fn deliver_injected(&mut self, vector: u8, software: bool) -> R {
        let source = if software { Source::IntN } else { Source::External };
        self.deliver(Event::plain(vector, source))
    }

    /// Delivers an event; faults on the way are combined with it. Benign ones replace each other for
    /// ever when a handler's stack is misaligned under alignment checks: then the event waits, so that
    /// the main loop can be kicked.
    pub fn deliver(&mut self, event: Event) -> R {
        let mut event = event;
        for _ in 0..MAX_SERIAL_FAULTS {
            self.note_payload(&event);
            match self.enter_handler(event) {
                Ok(()) => {
                    self.halted = false;
                    self.shadow = 0;
                    return Ok(());
                }
                Err(Stop::Fault) => match combine(&event, self.fault.into()) {
                    Some(next) => event = next,
                    None => {
                        self.exit = Some(Exit::Shutdown);
                        return Err(Stop::Exit);
                    }
                },
                Err(stop) => {
                    self.postpone(event);
                    return Err(stop);
                }
            }
        }
        self.postpone(event);
        Ok(())
    }

    /// A table or stack lies in MMIO space: the event waits for user space's answer.
    fn postpone(&mut self, event: Event) {
        match event.source {
            Source::Exception | Source::Int1 => {
                let Event { vector, error, payload, .. } = event;
                self.pending.exception = Some(Fault { vector, error, payload });
            }
            _ => self.pending.interrupt = Some((event.vector, event.software())),
        }
    }

    /// CR2 and DR6 change at delivery, even if the delivery faults. SDM vol. 3, 6.15, 17.2.3.
    fn note_payload(&mut self, event: &Event) {
        if event.source != Source::Exception {
            return;
        }
        match event.vector {
            vector::PF => self.cr2 = event.payload,
            vector::DB => self.note_debug_exception(event.payload),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(vector: u8) -> Event {
        Event::plain(vector, Source::Exception)
    }

    #[test]
    fn test_combine_contributory_faults_make_a_double_fault() {
        let double = |first, second| combine(&exception(first), exception(second)).map(|event| event.vector);
        assert_eq!(double(vector::GP, vector::NP), Some(vector::DF));
        assert_eq!(double(vector::PF, vector::PF), Some(vector::DF));
        assert_eq!(double(vector::PF, vector::GP), Some(vector::DF));
        assert_eq!(double(vector::GP, vector::PF), Some(vector::PF));
        assert_eq!(double(vector::UD, vector::GP), Some(vector::GP));
        assert_eq!(double(vector::DF, vector::GP), None);
        assert_eq!(double(vector::DF, vector::PF), None);
    }

    #[test]
    fn test_combine_after_an_interrupt_is_serial() {
        let interrupt = Event::plain(vector::GP, Source::External);
        assert_eq!(combine(&interrupt, exception(vector::NP)), Some(exception(vector::NP)));
    }
}
