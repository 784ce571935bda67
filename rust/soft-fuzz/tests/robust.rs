//! A slice of the robustness campaign, and cases that once hung or panicked.

use ostler_soft_fuzz::robust;

#[test]
fn test_random_bytes_in_random_states_neither_panic_nor_hang() {
    assert_eq!(robust::run(100_000, 1), Ok(true));
}

/// #AC while #AC is delivered, for ever: the main loop must still notice a kick.
#[test]
fn test_endless_alignment_faults_can_be_kicked() {
    assert_eq!(robust::run(1, 106_859), Ok(true));
}
