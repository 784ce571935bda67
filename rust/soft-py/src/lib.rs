//! The Python face of Ostler's software CPU: `ostler._soft`, as `src/ostler/_soft.pyi` describes it.
//!
//! Only conversion happens here. Every call leaves the GIL, because a request may wait for vCPUs that other
//! threads run; nothing in the engine calls back into Python. One file maps errors (`error`), one arguments
//! (`arg`), one shares the run page (`page`).

#![deny(missing_docs)]

mod arg;
mod error;
mod page;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMemoryView};

use crate::arg::Argument;
use crate::error::{closed, guard};
use crate::page::RunPage;

/// A handle of the engine that can be given up before Python's object dies.
///
/// The inner `Arc` is cloned for the time of a call, so that `close` never waits for a running vCPU.
struct Handle<T>(Mutex<Option<Arc<T>>>);

impl<T: Send + Sync> Handle<T> {
    fn new(inner: T) -> Self {
        Self(Mutex::new(Some(Arc::new(inner))))
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        // The lock only guards a pointer: a panic elsewhere cannot have left it half-written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> PyResult<Arc<T>> {
        self.slot().clone().ok_or_else(closed)
    }

    fn close(&self, py: Python<'_>) {
        let inner = self.slot().take();
        // The last reference may stop timer threads, and these take their time.
        py.detach(|| drop(inner));
    }
}

/// Plays /dev/kvm.
#[pyclass(module = "ostler._soft", frozen)]
struct System(Handle<ostler_soft::System>);

#[pymethods]
impl System {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        py.detach(|| guard(|| Ok(ostler_soft::System::new()))).map(|system| Self(Handle::new(system)))
    }

    #[pyo3(signature = (request, arg = None))]
    fn ioctl(&self, py: Python<'_>, request: u32, arg: Option<&Bound<'_, PyAny>>) -> PyResult<i64> {
        let system = self.0.get()?;
        Argument::with(py, arg, |bytes| system.ioctl(request, bytes))
    }

    fn create_vm(&self, py: Python<'_>) -> PyResult<Vm> {
        let system = self.0.get()?;
        py.detach(|| guard(|| Ok(system.create_vm()))).map(|vm| Vm(Handle::new(vm)))
    }

    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }
}

/// A virtual machine.
#[pyclass(module = "ostler._soft", frozen)]
struct Vm(Handle<ostler_soft::Vm>);

#[pymethods]
impl Vm {
    #[pyo3(signature = (request, arg = None))]
    fn ioctl(&self, py: Python<'_>, request: u32, arg: Option<&Bound<'_, PyAny>>) -> PyResult<i64> {
        let vm = self.0.get()?;
        Argument::with(py, arg, |bytes| vm.ioctl(request, bytes))
    }

    fn create_vcpu(&self, py: Python<'_>, vcpu_id: u32) -> PyResult<Vcpu> {
        let vm = self.0.get()?;
        py.detach(|| guard(|| vm.create_vcpu(vcpu_id))).map(|vcpu| Vcpu(Handle::new(vcpu)))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.0.get()?.counters();
        let dict = PyDict::new(py);
        for (name, value) in counters.named() {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn invalidate(&self, py: Python<'_>, gpa: u64, size: u64) -> PyResult<()> {
        let vm = self.0.get()?;
        py.detach(|| {
            guard(|| {
                vm.invalidate(gpa, size);
                Ok(())
            })
        })
    }

    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }
}

/// A virtual CPU.
#[pyclass(module = "ostler._soft", frozen)]
struct Vcpu(Handle<ostler_soft::Vcpu>);

#[pymethods]
impl Vcpu {
    #[pyo3(signature = (request, arg = None))]
    fn ioctl(&self, py: Python<'_>, request: u32, arg: Option<&Bound<'_, PyAny>>) -> PyResult<i64> {
        let vcpu = self.0.get()?;
        Argument::with(py, arg, |bytes| vcpu.ioctl(request, bytes))
    }

    fn run(&self, py: Python<'_>) -> PyResult<()> {
        let vcpu = self.0.get()?;
        py.detach(|| guard(|| vcpu.run()))
    }

    #[getter]
    fn run_page<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        let page = Bound::new(py, RunPage::new(self.0.get()?))?;
        PyMemoryView::from(page.as_any())
    }

    #[getter]
    fn instructions(&self, py: Python<'_>) -> PyResult<u64> {
        let vcpu = self.0.get()?;
        Ok(py.detach(|| vcpu.instructions()))
    }

    fn kick(&self) -> PyResult<()> {
        self.0.get()?.kick();
        Ok(())
    }

    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }
}

/// The module `ostler._soft`.
#[pymodule]
fn _soft(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<System>()?;
    module.add_class::<Vm>()?;
    module.add_class::<Vcpu>()
}
