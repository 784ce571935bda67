//! `make fuzz`: see the library's documentation.

use ostler_soft_fuzz::campaign::{report, Campaign, Comparer, Mismatch, Verdict};
use ostler_soft_fuzz::select::Catalogue;
use ostler_soft_fuzz::{corpus, robust, subject};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: ostler-soft-fuzz [--instructions N] [--seed N] [--require-coverage] [--mismatches N]
       [--save FOLDER] [--verbose]        compare random sequences with the host's CPU
       ostler-soft-fuzz --replay FILE...  compare saved cases
       ostler-soft-fuzz --mode robust [--instructions N] [--seed N]
                                          random bytes in random states: no panic, no hang";

#[derive(Default)]
struct Options {
    instructions: u64,
    seed: u64,
    require_coverage: bool,
    mismatches: u64,
    save: Option<PathBuf>,
    replay: Vec<PathBuf>,
    robust: bool,
    verbose: bool,
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { instructions: 50_000_000, seed: 1, mismatches: 1, ..Options::default() };
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        let number = |text: String| text.replace('_', "").parse().map_err(|_| format!("not a number: {text}"));
        match argument.as_str() {
            "--instructions" => options.instructions = number(value()?)?,
            "--seed" => options.seed = number(value()?)?,
            "--mismatches" => options.mismatches = number(value()?)?,
            "--save" => options.save = Some(value()?.into()),
            "--require-coverage" => options.require_coverage = true,
            "--verbose" => options.verbose = true,
            "--mode" => options.robust = value()? == "robust",
            "--replay" => options.replay.extend(arguments.by_ref().map(PathBuf::from)),
            _ => return Err(format!("unknown argument {argument}\n{USAGE}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    if std::env::args().skip(1).any(|argument| argument == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let result = parse(std::env::args().skip(1)).and_then(|options| match &options {
        options if options.robust => robust::run(options.instructions, options.seed),
        options if !options.replay.is_empty() => replay(&options.replay),
        options => fuzz(options),
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("ostler-soft-fuzz: {message}");
            ExitCode::from(2)
        }
    }
}

fn replay(files: &[PathBuf]) -> Result<bool, String> {
    let mut comparer = Comparer::new()?;
    let mut good = true;
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let case = corpus::parse(&text).map_err(|error| format!("{}: {error}", file.display()))?;
        if !subject::is_safe_case(&case) {
            return Err(format!("{}: an instruction that the host must not execute", file.display()));
        }
        let verdict = comparer.compare(&case, &case.memory());
        println!("{}: {verdict:?}", file.display());
        if verdict != Verdict::Same {
            print!("{}", report(&case, verdict, &comparer.differences()));
            good = false;
        }
    }
    Ok(good)
}

fn fuzz(options: &Options) -> Result<bool, String> {
    let catalogue = Catalogue::new();
    let mut campaign = Campaign::new(&catalogue, options.seed)?;
    let start = Instant::now();
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    while campaign.totals.instructions < options.instructions {
        let Some(mismatch) = campaign.round() else { continue };
        let count = found.entry(mismatch.signature.clone()).or_default();
        *count += 1;
        if *count == 1 {
            show(&mismatch, options.save.as_deref(), found.len())?;
        }
        if found.values().sum::<u64>() >= options.mismatches {
            break;
        }
    }
    let mismatches: u64 = found.values().sum();
    let missing = campaign.coverage.missing_rows(&catalogue);
    let (covered, encodings) = campaign.coverage.encodings(&catalogue);
    let seconds = start.elapsed().as_secs_f64();
    let (totals, rows) = (&campaign.totals, catalogue.rows.len());
    println!("seed                     {:>12}", options.seed);
    println!(
        "instructions compared    {:>12}  in {seconds:.1} s, natively, stepping, by blocks and translated",
        totals.instructions
    );
    println!("cases compared           {:>12}  of which {} changed their own code", totals.cases, totals.changed);
    println!("cases not comparable     {:>12}", totals.skipped);
    println!("exceptions compared      {:>12}", campaign.coverage.faults());
    println!("mismatches               {mismatches:>12}");
    println!("rows covered             {:>12}  of {rows} user-mode rows", rows - missing.len());
    println!("encodings covered        {covered:>12}  of {encodings}");
    for (signature, count) in &found {
        println!("mismatch                 {count:>12}  {signature}");
    }
    if !missing.is_empty() {
        println!("rows not covered: {missing:?}");
    }
    for (mnemonic, why) in &catalogue.left_out {
        println!("row left out: {mnemonic:?}: {why}");
    }
    if options.verbose {
        println!("encodings not covered: {:?}", campaign.coverage.missing_encodings(&catalogue));
    }
    Ok(mismatches == 0 && (missing.is_empty() || !options.require_coverage))
}

fn show(mismatch: &Mismatch, save: Option<&Path>, number: usize) -> Result<(), String> {
    println!("mismatch: {}\n{}", mismatch.signature, mismatch.report);
    if let Some(folder) = save {
        let file = folder.join(format!("mismatch-{number}.case"));
        let text = corpus::print(&mismatch.case, &mismatch.report);
        std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        println!("saved as {}", file.display());
    }
    Ok(())
}
