//! The power button, for a guest whose first process is the agent: input events of the ACPI button's driver.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on x86-64: seconds, microseconds, type, code, value.
const EVENT: usize = 24;

/// Opens the buttons there are.
pub fn open() -> Vec<File> {
    let entries = fs::read_dir("/sys/class/input").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
        .filter(|entry| {
            fs::read_to_string(entry.path().join("device/name")).is_ok_and(|name| name.trim() == "Power Button")
        })
        .filter_map(|entry| {
            let path = Path::new("/dev/input").join(entry.file_name());
            File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).ok()
        })
        .collect()
}

/// Takes what a button has said; whether it was pressed.
pub fn was_pressed(mut button: &File) -> bool {
    let mut bytes = [0; EVENT * 16];
    let count = button.read(&mut bytes).unwrap_or(0);
    bytes[..count].chunks_exact(EVENT).any(is_press)
}

fn is_press(event: &[u8]) -> bool {
    let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    word(16) == EV_KEY && word(18) == KEY_POWER && event[20..24] != [0; 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: u32) -> Vec<u8> {
        [&[0; 16][..], &kind.to_ne_bytes(), &code.to_ne_bytes(), &value.to_ne_bytes()].concat()
    }

    #[test]
    fn test_only_pressing_the_power_key_counts() {
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 30, 1)));
        assert!(!is_press(&event(0, 0, 0)));
    }
}
