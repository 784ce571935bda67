//! The argument of a request: eight bytes of an int, or a bytearray updated in place.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyInt;

use crate::error::guard;

/// Ways to hand bytes to the engine.
pub(crate) struct Argument;

impl Argument {
    /// Calls the engine without the GIL on the argument's bytes.
    ///
    /// A bytearray is copied in and, whatever the outcome, back: KVM updates structures on some errors too (the
    /// count of a table that did not fit). Its buffer stays exported meanwhile, so that nobody resizes it, and the
    /// engine never looks at bytes another Python thread may be writing.
    pub(crate) fn with(
        py: Python<'_>,
        arg: Option<&Bound<'_, PyAny>>,
        call: impl FnOnce(&mut [u8]) -> Result<i64, i32> + Send,
    ) -> PyResult<i64> {
        let Some(arg) = arg else {
            return Self::with_int(py, 0, call);
        };
        if arg.is_instance_of::<PyInt>() {
            return Self::with_int(py, as_word(arg)?, call);
        }
        let buffer = PyBuffer::<u8>::get(arg)?;
        if buffer.readonly() {
            return Err(PyTypeError::new_err("a request's argument must be an int or a bytearray"));
        }
        let mut bytes = buffer.to_vec(py)?;
        let result = py.detach(|| guard(|| call(&mut bytes)));
        buffer.copy_from_slice(py, &bytes)?;
        result
    }

    fn with_int(py: Python<'_>, value: u64, call: impl FnOnce(&mut [u8]) -> Result<i64, i32> + Send) -> PyResult<i64> {
        let mut bytes = value.to_le_bytes();
        py.detach(|| guard(|| call(&mut bytes)))
    }
}

/// An int as the kernel's unsigned long; negative ones in two's complement, as C would pass them.
fn as_word(arg: &Bound<'_, PyAny>) -> PyResult<u64> {
    arg.extract::<u64>().or_else(|_| arg.extract::<i64>().map(|value| value as u64))
}
