//! Everything that comes to a processor from outside, in order: what its board answered, and when it
//! looked for events. The leader's board writes it down, the follower's reads it back, and every
//! question that the follower asks must be the one that the leader asked there.

use crate::cpu::{Board, Gp};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// IA32_APIC_BASE: CPUID reads it, which the translator may do from a cache. It is not logged.
const APIC_BASE: u32 = 0x1b;
/// Writing these has the board write [`CLOCK_BYTES`] of guest memory: kvmclock's two pages.
const CLOCK_MSRS: [u32; 4] = [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01];
pub(super) const CLOCK_BYTES: usize = 32;

/// A moment of a processor's life: instructions retired, exceptions delivered. A repeated
/// instruction has no moments between its steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment {
    pub retired: u64,
    pub faults: u64,
}

/// What a board is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    MmioRead(u64, u8),
    MmioWrite(u64, u8, u64),
    PioRead(u16, u8),
    PioWrite(u16, u8, u32),
    MsrRead(u32),
    MsrWrite(u32, u64),
    Cr8,
    SetCr8(u64),
    AckInterrupt,
    TakeNmi,
    TakeInit,
    TakeSipi,
    Tsc,
    SetTsc(u64),
    Random,
    Hypercall(u64, [u64; 4]),
}

/// What it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is not the board's, or there is none.
    No,
    /// #GP.
    Refused,
    Value(u64),
}

impl Answer {
    fn option(value: Option<u64>) -> Self {
        value.map_or(Self::No, Self::Value)
    }

    fn yes(yes: bool) -> Self {
        if yes {
            Self::Value(1)
        } else {
            Self::No
        }
    }

    fn value(self) -> Option<u64> {
        match self {
            Self::Value(value) => Some(value),
            _ => None,
        }
    }
}

/// An entry of the log.
pub(super) enum Entry {
    /// The processor looked for events, with these attention bits.
    Attend(Moment, u32),
    /// A question, its answer, and memory that changed with it.
    Asked(Question, Answer, Option<(u64, [u8; CLOCK_BYTES])>),
}

/// The log between the two.
#[derive(Default)]
pub(super) struct Log {
    pub entries: VecDeque<Entry>,
    /// The leader is executing: questions from elsewhere (requests of user space) do not count.
    pub on: bool,
    /// Exceptions that the leader has delivered.
    pub faults: u64,
    /// Memory that the follower must take over.
    pub memory: Vec<(u64, [u8; CLOCK_BYTES])>,
    /// IA32_APIC_BASE as the follower sees it.
    pub apic_base: u64,
    /// The follower asked something else.
    pub error: Option<String>,
}

pub(super) type SharedLog = Arc<Mutex<Log>>;

/// Locks; a panic of the other side has been reported by then.
pub(super) fn lock(log: &SharedLog) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads guest memory.
pub(crate) type Peek = Box<dyn Fn(u64, &mut [u8]) -> bool + Send>;

/// The leader's board: the real one, listened to.
pub(super) struct Recorder {
    pub inner: Box<dyn Board>,
    pub log: SharedLog,
    pub peek: Peek,
}

impl Recorder {
    fn note(&self, question: Question, answer: Answer) {
        let mut log = lock(&self.log);
        if log.on {
            log.entries.push_back(Entry::Asked(question, answer, None));
        }
    }
}

impl Board for Recorder {
    fn attending(&mut self, bits: u32, retired: u64) {
        let mut log = lock(&self.log);
        if log.on {
            let moment = Moment { retired, faults: log.faults };
            log.entries.push_back(Entry::Attend(moment, bits));
        }
    }
    fn mmio_read(&mut self, gpa: u64, size: u8) -> Option<u64> {
        let value = self.inner.mmio_read(gpa, size);
        self.note(Question::MmioRead(gpa, size), Answer::option(value));
        value
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> bool {
        let taken = self.inner.mmio_write(gpa, size, value);
        self.note(Question::MmioWrite(gpa, size, value), Answer::yes(taken));
        taken
    }
    fn pio_read(&mut self, port: u16, size: u8) -> Option<u32> {
        let value = self.inner.pio_read(port, size);
        self.note(Question::PioRead(port, size), Answer::option(value.map(u64::from)));
        value
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) -> bool {
        let taken = self.inner.pio_write(port, size, value);
        self.note(Question::PioWrite(port, size, value), Answer::yes(taken));
        taken
    }
    fn msr_read(&mut self, msr: u32) -> Option<Result<u64, Gp>> {
        let answer = self.inner.msr_read(msr);
        if msr != APIC_BASE {
            let noted = answer.map_or(Answer::No, |result| result.map_or(Answer::Refused, Answer::Value));
            self.note(Question::MsrRead(msr), noted);
        }
        answer
    }
    fn msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Gp>> {
        let answer = self.inner.msr_write(msr, value);
        let noted = answer.map_or(Answer::No, |result| result.map_or(Answer::Refused, |()| Answer::Value(0)));
        let mut bytes = [0; CLOCK_BYTES];
        let at = value & !3;
        let changed = CLOCK_MSRS.contains(&msr) && (self.peek)(at, &mut bytes);
        let mut log = lock(&self.log);
        if log.on {
            let memory = changed.then_some((at, bytes));
            log.entries.push_back(Entry::Asked(Question::MsrWrite(msr, value), noted, memory));
        }
        answer
    }
    fn cr8(&mut self) -> u64 {
        let value = self.inner.cr8();
        self.note(Question::Cr8, Answer::Value(value));
        value
    }
    fn set_cr8(&mut self, value: u64) {
        self.inner.set_cr8(value);
        self.note(Question::SetCr8(value), Answer::No);
    }
    fn has_interrupt(&self) -> bool {
        self.inner.has_interrupt()
    }
    fn ack_interrupt(&mut self) -> Option<u8> {
        let vector = self.inner.ack_interrupt();
        self.note(Question::AckInterrupt, Answer::option(vector.map(u64::from)));
        vector
    }
    fn take_nmi(&mut self) -> bool {
        let taken = self.inner.take_nmi();
        self.note(Question::TakeNmi, Answer::yes(taken));
        taken
    }
    fn take_init(&mut self) -> bool {
        let taken = self.inner.take_init();
        self.note(Question::TakeInit, Answer::yes(taken));
        taken
    }
    fn is_bsp(&self) -> bool {
        self.inner.is_bsp()
    }
    fn take_sipi(&mut self) -> Option<u8> {
        let page = self.inner.take_sipi();
        self.note(Question::TakeSipi, Answer::option(page.map(u64::from)));
        page
    }
    fn has_irqchip(&self) -> bool {
        self.inner.has_irqchip()
    }
    fn tsc(&self) -> u64 {
        let value = self.inner.tsc();
        self.note(Question::Tsc, Answer::Value(value));
        value
    }
    fn set_tsc(&mut self, value: u64) {
        self.inner.set_tsc(value);
        self.note(Question::SetTsc(value), Answer::No);
    }
    fn random(&mut self) -> Option<u64> {
        let value = self.inner.random();
        self.note(Question::Random, Answer::option(value));
        value
    }
    fn code_page(&mut self, gpa: u64) -> bool {
        self.inner.code_page(gpa)
    }
    fn code_changed(&mut self) {
        self.inner.code_changed();
    }
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        let value = self.inner.hypercall(nr, args);
        self.note(Question::Hypercall(nr, args), Answer::Value(value));
        value
    }
}

/// The follower's board: what the leader's answered.
pub(super) struct Replayer {
    pub log: SharedLog,
    pub irqchip: bool,
}

impl Replayer {
    fn ask(&self, question: Question) -> Answer {
        let mut log = lock(&self.log);
        let (answer, memory, wrong) = match log.entries.pop_front() {
            Some(Entry::Asked(asked, answer, memory)) if asked == question => (answer, memory, None),
            Some(Entry::Asked(asked, ..)) => (Answer::No, None, Some(format!("{asked:x?} there"))),
            Some(Entry::Attend(at, _)) => (Answer::No, None, Some(format!("nothing before an event at {at:?}"))),
            None => (Answer::No, None, Some("nothing more".to_owned())),
        };
        if let Some(instead) = wrong.filter(|_| log.error.is_none()) {
            log.error = Some(format!("the follower asks {question:x?}, the leader asked {instead}"));
        }
        log.memory.extend(memory);
        if let (Question::MsrWrite(APIC_BASE, value), Answer::Value(_)) = (question, answer) {
            log.apic_base = value;
        }
        answer
    }

    fn value(&self, question: Question) -> u64 {
        self.ask(question).value().unwrap_or(0)
    }

    fn yes(&self, question: Question) -> bool {
        self.ask(question) != Answer::No
    }
}

impl Board for Replayer {
    fn mmio_read(&mut self, gpa: u64, size: u8) -> Option<u64> {
        self.ask(Question::MmioRead(gpa, size)).value()
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> bool {
        self.yes(Question::MmioWrite(gpa, size, value))
    }
    fn pio_read(&mut self, port: u16, size: u8) -> Option<u32> {
        self.ask(Question::PioRead(port, size)).value().map(|value| value as u32)
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) -> bool {
        self.yes(Question::PioWrite(port, size, value))
    }
    fn msr_read(&mut self, msr: u32) -> Option<Result<u64, Gp>> {
        if msr == APIC_BASE {
            return Some(Ok(lock(&self.log).apic_base));
        }
        match self.ask(Question::MsrRead(msr)) {
            Answer::No => None,
            Answer::Refused => Some(Err(Gp)),
            Answer::Value(value) => Some(Ok(value)),
        }
    }
    fn msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Gp>> {
        match self.ask(Question::MsrWrite(msr, value)) {
            Answer::No => None,
            Answer::Refused => Some(Err(Gp)),
            Answer::Value(_) => Some(Ok(())),
        }
    }
    fn cr8(&mut self) -> u64 {
        self.value(Question::Cr8)
    }
    fn set_cr8(&mut self, value: u64) {
        self.ask(Question::SetCr8(value));
    }
    /// Events come when the log says so.
    fn has_interrupt(&self) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> Option<u8> {
        self.ask(Question::AckInterrupt).value().map(|vector| vector as u8)
    }
    fn take_nmi(&mut self) -> bool {
        self.yes(Question::TakeNmi)
    }
    fn take_init(&mut self) -> bool {
        self.yes(Question::TakeInit)
    }
    fn is_bsp(&self) -> bool {
        true
    }
    fn take_sipi(&mut self) -> Option<u8> {
        self.ask(Question::TakeSipi).value().map(|page| page as u8)
    }
    fn has_irqchip(&self) -> bool {
        self.irqchip
    }
    fn tsc(&self) -> u64 {
        self.value(Question::Tsc)
    }
    fn set_tsc(&mut self, value: u64) {
        self.ask(Question::SetTsc(value));
    }
    fn random(&mut self) -> Option<u64> {
        self.ask(Question::Random).value()
    }
    fn code_page(&mut self, _: u64) -> bool {
        false
    }
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        self.value(Question::Hypercall(nr, args))
    }
}
