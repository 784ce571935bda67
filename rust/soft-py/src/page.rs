//! The run page as a Python buffer: `struct kvm_run` and the port-data page, shared with the engine.

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Exports a vCPU's page. It holds the vCPU, so the page outlives every view of it, a closed vCPU's too.
#[pyclass(module = "ostler._soft", frozen)]
pub(crate) struct RunPage(Arc<ostler_soft::Vcpu>);

impl RunPage {
    pub(crate) fn new(vcpu: Arc<ostler_soft::Vcpu>) -> Self {
        Self(vcpu)
    }
}

#[pymethods]
impl RunPage {
    /// Python's buffer protocol: a flat, writable run of bytes.
    ///
    /// # Safety
    /// Called by Python only, with a `view` to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (start, size) = slf.get().0.run_page();
        let size = ffi::Py_ssize_t::try_from(size).map_err(|_| PyBufferError::new_err("run page too large"))?;
        // SAFETY: `view` is Python's to fill. The page belongs to the vCPU `slf` holds, and the view keeps `slf`; as with
        // KVM's mapping, both sides may write it at any time, and both treat it as plain bytes.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), size, 0, flags) };
        if filled == 0 {
            return Ok(());
        }
        Err(PyErr::take(slf.py()).unwrap_or_else(|| PyBufferError::new_err("run page not exported")))
    }
}
