//! The loop: sequences, several initial states for each, three executions of each pair.

use crate::compare;
use crate::coverage::Coverage;
use crate::generate::Generator;
use crate::layout::*;
use crate::native::Native;
use crate::rng::Rng;
use crate::select::Catalogue;
use crate::sequence::Sequence;
use crate::shrink::{self, shrink};
use crate::subject::{self, Trace};
use crate::values;
use iced_x86::Code;

/// Initial states per sequence.
const VARIANTS: usize = 4;
/// Different memory contents, chosen among by each variant.
const FILLS: u64 = 64;

/// The executors, and a comparison's buffers.
pub struct Comparer {
    native: Native,
    subject: subject::Subject,
    translating: [subject::Subject; 2],
    native_outcome: Outcome,
    ours: Outcome,
    trace: Trace,
}

/// How the engine executes a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The interpreter, one instruction at a time.
    Stepping,
    /// The interpreter, by decoded blocks.
    Blocks,
    /// Translated code.
    Translated,
}

/// What a comparison says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both executors agree.
    Same,
    /// They do not, and this is how the instructions were executed.
    Different(Way),
    /// The case left the path that the host may take, or does not end.
    Skipped,
}

impl Comparer {
    /// Both executors.
    pub fn new() -> Result<Self, String> {
        Ok(Self {
            native: Native::new()?,
            subject: subject::Subject::new()?,
            translating: [subject::Subject::translating(1)?, subject::Subject::translating(3)?],
            native_outcome: Outcome::default(),
            ours: Outcome::default(),
            trace: Trace::default(),
        })
    }

    /// Executes a case with this memory: stepping, natively, by blocks, translated at once, and (where
    /// it may have loops) translated in the midst of it. The code is put in its place each time.
    pub fn compare(&mut self, case: &Case, memory: &Memory) -> Verdict {
        self.subject.place(case);
        self.subject.step(case, memory, &mut self.ours, &mut self.trace);
        if matches!(self.ours.end, End::Unsafe | End::Limit) || meets_tables(self.ours.end) {
            return Verdict::Skipped;
        }
        self.native.run(case, memory, &mut self.native_outcome);
        // All cases end. But where the host's kernel slows down locked accesses across cache lines, which it may trap
        // (split lock detection), one that has many of them takes longer than anybody waits.
        if self.native_outcome.end == End::Limit {
            return Verdict::Skipped;
        }
        if self.differs(case) {
            return Verdict::Different(Way::Stepping);
        }
        self.subject.place(case);
        self.subject.run(case, memory, &mut self.ours);
        if self.differs(case) {
            return Verdict::Different(Way::Blocks);
        }
        let loops = case.starts.len() > 64 || case.changes();
        for index in 0..1 + loops as usize {
            self.translating[index].place(case);
            self.translating[index].run(case, memory, &mut self.ours);
            if self.differs(case) {
                return Verdict::Different(Way::Translated);
            }
        }
        Verdict::Same
    }

    fn differs(&mut self, case: &Case) -> bool {
        if compare::same(&self.native_outcome, &self.ours) {
            return false;
        }
        compare::excuse(case, &self.native_outcome, &mut self.ours);
        !compare::same(&self.native_outcome, &self.ours)
    }

    /// The differences of the last comparison.
    pub fn differences(&self) -> String {
        compare::differences(&self.native_outcome, &self.ours)
    }
}

/// Whether a case ends by an access between 1 and 2 GiB: the translator's tables are there, so that the host, in the
/// same process, would find memory, and might change it.
fn meets_tables(end: End) -> bool {
    matches!(end, End::Fault { vector: 14, address: 0x4000_0000..0x8000_0000, .. })
}

/// A mismatch, made small.
pub struct Mismatch {
    /// The case.
    pub case: Case,
    /// Disassembly, initial state and differences.
    pub report: String,
    /// What the mismatch is about: the last instruction that ran.
    pub signature: String,
}

/// Figures of a campaign.
#[derive(Default)]
pub struct Totals {
    /// Instructions compared.
    pub instructions: u64,
    /// Cases compared.
    pub cases: u64,
    /// Cases among them that changed their own code.
    pub changed: u64,
    /// Cases that could not be compared.
    pub skipped: u64,
}

/// A campaign.
pub struct Campaign<'a> {
    generator: Generator<'a>,
    comparer: Comparer,
    fills: Vec<Memory>,
    rng: Rng,
    /// What was covered.
    pub coverage: Coverage,
    /// How much was done.
    pub totals: Totals,
}

impl<'a> Campaign<'a> {
    /// A campaign over a catalogue.
    pub fn new(catalogue: &'a Catalogue, seed: u64) -> Result<Self, String> {
        Ok(Self {
            generator: Generator::new(catalogue, seed),
            comparer: Comparer::new()?,
            fills: (0..FILLS).map(Memory::filled).collect(),
            rng: Rng::new(seed ^ 0x0f0f_f0f0),
            coverage: Coverage::default(),
            totals: Totals::default(),
        })
    }

    /// One sequence with its variants; the first mismatch, if any.
    pub fn round(&mut self) -> Option<Mismatch> {
        let (sequence, kinds, changing) = match self.rng.below(10) {
            0..=1 => shaped(self.generator.shaped(false), false),
            2..=3 => shaped(self.generator.shaped(true), true),
            _ => shaped(self.generator.sequence(), false),
        };
        let rip = self.place_for(&sequence, changing)?;
        let (code, starts) = sequence.lay_out(rip);
        let bits = self.generator.bits;
        let mut case = Case { bits, code, starts, state: State::default(), fill: 0, pokes: Vec::new() };
        let codes: Vec<Code> = case.instructions().iter().map(|instruction| instruction.code()).collect();
        for _ in 0..VARIANTS {
            case.state = values::initial_state(&mut self.rng, &kinds, bits);
            case.state.rip = rip;
            case.fill = self.rng.below(FILLS);
            match self.comparer.compare(&case, &self.fills[case.fill as usize]) {
                Verdict::Same => self.count(&codes, &case),
                Verdict::Skipped => self.totals.skipped += 1,
                verdict @ Verdict::Different(_) => {
                    let first = format!("at first {verdict:?}\n{}", self.comparer.differences());
                    let subject = shrink::Subject { bits, sequence, state: case.state, fill: case.fill };
                    let mismatch = self.reduce(subject);
                    return Some(Mismatch { report: mismatch.report + &first, ..mismatch });
                }
            }
        }
        None
    }

    fn count(&mut self, codes: &[Code], case: &Case) {
        self.totals.cases += 1;
        let code = &self.comparer.ours.code;
        self.totals.changed += (!code.is_empty() && *code != case.image()) as u64;
        self.totals.instructions += self.comparer.trace.steps.len() as u64;
        for &(index, completed) in &self.comparer.trace.steps {
            self.coverage.note(codes[index as usize], completed);
        }
    }

    /// Where the sequence is put: a fifth of them over a page boundary. `None`: it is too long.
    fn place_for(&mut self, sequence: &Sequence, changing: bool) -> Option<u64> {
        let size: usize = sequence.items.iter().map(|item| item.bytes.len()).sum();
        let area = if changing { PATCH } else { CODE };
        if size > 0x1700 {
            return None;
        }
        if self.rng.percent(20) && size > 0 {
            return Some(area + 0x2000 - self.rng.below(size as u64 + 7));
        }
        Some(area + 0x1000 + self.rng.below(0x800))
    }

    fn reduce(&mut self, subject: shrink::Subject) -> Mismatch {
        let comparer = &mut self.comparer;
        let mut fails = |case: &Case| {
            let memory = case.memory();
            matches!(comparer.compare(case, &memory), Verdict::Different(_))
        };
        let case = shrink(subject, &mut fails).case();
        let memory = case.memory();
        let verdict = self.comparer.compare(&case, &memory);
        let report = report(&case, verdict, &self.comparer.differences());
        Mismatch { signature: signature(&case), report, case }
    }
}

fn shaped((sequence, kinds): (Sequence, [values::Kind; 16]), changing: bool) -> (Sequence, [values::Kind; 16], bool) {
    (sequence, kinds, changing)
}

fn signature(case: &Case) -> String {
    let instructions = case.instructions();
    let names: Vec<String> = instructions.iter().rev().take(2).map(|i| format!("{:?}", i.code())).collect();
    names.join(" after ")
}

/// A case in words.
pub fn report(case: &Case, verdict: Verdict, differences: &str) -> String {
    use iced_x86::{Formatter, IntelFormatter};
    let mut formatter = IntelFormatter::new();
    let mut listing = String::new();
    for (instruction, &start) in case.instructions().iter().zip(&case.starts) {
        let mut text = String::new();
        formatter.format(instruction, &mut text);
        let bytes: Vec<String> = case.code[start..start + instruction.len().min(case.code.len() - start)]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        listing += &format!("  {:#x}  {:<32} {text}\n", instruction.ip(), bytes.join(" "));
    }
    let state = compare::describe(&case.state);
    format!(
        "{verdict:?}, {} bits\n{listing}from (memory fill {})\n{state}differences\n{differences}",
        case.bits, case.fill
    )
}
