//! Errors on their way to Python: errno becomes OSError, a panic becomes RuntimeError.

use std::any::Any;
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::PyErr;

/// Linux's EBADF, what a closed file descriptor answers.
const EBADF: i32 = 9;

/// `OSError(errno, text)`; Python makes InterruptedError and its like of it.
pub(crate) fn os_error(errno: i32) -> PyErr {
    let described = io::Error::from_raw_os_error(errno).to_string();
    // Rust appends " (os error 4)", which strerror does not.
    let text = described.split(" (os error").next().unwrap_or(&described).to_owned();
    PyOSError::new_err((errno, text))
}

/// The error of a handle that was closed.
pub(crate) fn closed() -> PyErr {
    os_error(EBADF)
}

/// Runs a call into the engine. A panic there is a defect of the engine: the caller learns of it, the process
/// goes on. The engine's own locks say whether what it left behind can still be used.
pub(crate) fn guard<T>(call: impl FnOnce() -> Result<T, i32>) -> Result<T, PyErr> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(os_error),
        Err(payload) => Err(PyRuntimeError::new_err(format!("the software CPU failed: {}", describe(&*payload)))),
    }
}

fn describe(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        return text;
    }
    payload.downcast_ref::<String>().map_or("no reason given", String::as_str)
}
