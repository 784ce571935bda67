//! A slice of `make fuzz`: enough to meet every row of the opcode table.

use ostler_soft_fuzz::campaign::Campaign;
use ostler_soft_fuzz::native;
use ostler_soft_fuzz::select::Catalogue;

const INSTRUCTIONS: u64 = 700_000;
/// Fixed: a test does the same each time.
const SEED: u64 = 20_261_122;

#[test]
fn test_slice_of_random_code_agrees_with_the_host_and_covers_every_row() {
    if let Some(obstacle) = native::obstacle() {
        eprintln!("left out: {obstacle}");
        return;
    }
    let catalogue = Catalogue::new();
    let mut campaign = Campaign::new(&catalogue, SEED).unwrap();
    while campaign.totals.instructions < INSTRUCTIONS {
        if let Some(mismatch) = campaign.round() {
            panic!("mismatch: {}\n{}", mismatch.signature, mismatch.report);
        }
    }
    assert_eq!(campaign.coverage.missing_rows(&catalogue), []);
}
