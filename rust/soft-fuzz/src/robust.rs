//! Random bytes in random states.

/// Runs it.
pub fn run(_instructions: u64, _seed: u64) -> Result<bool, String> {
    Err("not yet".to_owned())
}
