//! Adapter files for Python: `check_adapter`, `load_adapter` and the values they deal in.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use loraserve_adapters::{
    self as adapters, BaseModel, BaseWeights, Expected, FactorDtype, Limits, Place, Registered,
    StorageDtype, StoredWeight,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::base_linears::BaseLinears;
use crate::errors::of_adapter;
use crate::layout::AdapterLayout;
use crate::shape::BaseShape;

/// A Python function: of a module's weight as it is stored the shape, the rows' digests, and whether it is both
/// embedding and head.
struct BaseFunction(Py<PyAny>);

impl BaseWeights for BaseFunction {
    fn stored(&self, module: &str) -> Result<StoredWeight, String> {
        let stored = Python::attach(|py| {
            self.0
                .call1(py, (module,))?
                .extract::<([usize; 2], Vec<u8>, bool)>(py)
        });
        let (shape, digests, is_tied) = stored.map_err(|error| error.to_string())?;
        let expected = shape[0] * adapters::DIGEST_NBYTES;
        if digests.len() != expected {
            let len = digests.len();
            return Err(format!(
                "the digests of {module} have {len} bytes, expected {expected}"
            ));
        }
        Ok(StoredWeight {
            shape,
            digests,
            is_tied,
        })
    }
}

type HeadParts<'py> = (
    &'static str,
    usize,
    usize,
    Bound<'py, PyBytes>,
    Option<Bound<'py, PyBytes>>,
);

/// What a checked adapter turned out to be.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Receipt {
    inner: adapters::Receipt,
}

#[pymethods]
impl Receipt {
    /// Lossless: it is the path given, which was text, and what was found below it by a name that is.
    #[getter]
    fn directory(&self) -> String {
        self.inner.directory.to_string_lossy().into_owned()
    }

    #[getter]
    fn tensors(&self) -> usize {
        self.inner.tensors
    }

    #[getter]
    fn modules(&self) -> Vec<String> {
        self.inner.modules.clone()
    }

    #[getter]
    fn layers(&self) -> Vec<usize> {
        self.inner.layers.clone()
    }

    #[getter]
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    #[getter]
    fn ranks(&self) -> Vec<usize> {
        self.inner.ranks.clone()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes
    }

    #[getter]
    fn extent_nbytes(&self) -> usize {
        self.inner.extent_nbytes
    }

    #[getter]
    fn hash(&self) -> &str {
        &self.inner.hash
    }

    #[getter]
    fn base_check(&self) -> &str {
        &self.inner.base_check
    }

    #[getter]
    fn base_model(&self) -> Option<&str> {
        self.inner.base_model.as_deref()
    }

    #[getter]
    fn invocation_tokens(&self) -> Vec<i32> {
        self.inner.invocation_tokens.clone()
    }

    #[getter]
    fn base_copies(&self) -> Vec<String> {
        self.inner.base_copies.clone()
    }

    #[getter]
    fn is_compared(&self) -> bool {
        self.inner.is_compared
    }

    #[getter]
    fn changes_tables(&self) -> bool {
        self.inner.changes_tables
    }

    #[getter]
    fn added_tokens(&self) -> Vec<u32> {
        self.inner.replaced_rows.added_tokens().collect()
    }

    #[getter]
    fn added_head_tokens(&self) -> Vec<u32> {
        self.inner.replaced_rows.added_head_tokens().collect()
    }

    /// (module, labels, features, weight, bias) as float32 in bytes.
    #[getter]
    fn head<'py>(&self, py: Python<'py>) -> Option<HeadParts<'py>> {
        let head = self.inner.head.as_ref()?;
        let bias = head.bias.as_ref().map(|bias| PyBytes::new(py, bias));
        Some((
            head.module,
            head.num_labels,
            head.num_features,
            PyBytes::new(py, &head.weight),
            bias,
        ))
    }

    #[getter]
    fn task_type(&self) -> Option<&str> {
        self.inner.task_type.as_deref()
    }

    #[getter]
    fn notes(&self) -> Vec<String> {
        self.inner.notes.clone()
    }

    #[getter]
    fn not_used(&self) -> Vec<String> {
        self.inner.not_used.clone()
    }

    #[getter]
    fn alone(&self) -> Option<&'static str> {
        self.inner.alone
    }

    /// The same receipt with what lies beside the weights: further notes, and what is not used; without a head.
    fn with_beside(&self, notes: Vec<String>, not_used: Vec<String>) -> Self {
        let mut inner = self.inner.clone();
        inner.head = None;
        inner.notes.extend(notes);
        inner.not_used = not_used;
        Self { inner }
    }

    fn __repr__(&self) -> String {
        let receipt = &self.inner;
        format!(
            "Receipt(tensors={}, modules={:?}, layers={}, ranks={:?}, nbytes={}, hash={:.12}, base_check={:?})",
            receipt.tensors,
            receipt.modules,
            receipt.layers.len(),
            receipt.ranks,
            receipt.nbytes,
            receipt.hash,
            receipt.base_check
        )
    }
}

/// How long reading an adapter rests between its bursts; may change while it is read.
#[pyclass(frozen, module = "loraserve._core")]
pub struct LoadPace {
    pub inner: Arc<adapters::Pace>,
}

impl LoadPace {
    /// The pace given, or full speed.
    fn of(pace: Option<&Self>) -> Arc<adapters::Pace> {
        pace.map(|pace| Arc::clone(&pace.inner)).unwrap_or_default()
    }
}

#[pymethods]
impl LoadPace {
    #[new]
    fn new() -> Self {
        Self {
            inner: Arc::default(),
        }
    }

    fn set_rest(&self, seconds: f64) -> PyResult<()> {
        let rest = Duration::try_from_secs_f64(seconds);
        let rest =
            rest.map_err(|error| PyValueError::new_err(format!("rest is {seconds}: {error}")))?;
        self.inner.set_rest(rest);
        Ok(())
    }
}

/// Reads and checks all of an adapter; raises `AdapterFormatError`.
#[pyfunction]
#[pyo3(signature = (path, shape, dtype, max_lora_rank, pace=None, base_weights=None, stored=None, adapter_dtype="auto"))]
fn check_adapter(
    py: Python<'_>,
    path: &str,
    shape: &BaseShape,
    dtype: &str,
    max_lora_rank: usize,
    pace: Option<&LoadPace>,
    base_weights: Option<Py<PyAny>>,
    stored: Option<(String, String)>,
    adapter_dtype: &str,
) -> PyResult<Receipt> {
    let limits = limits((dtype, adapter_dtype), max_lora_rank)?;
    let pace = LoadPace::of(pace);
    let base = base_weights.map(BaseFunction);
    let base = base.as_ref().map(|base| base as &dyn BaseWeights);
    let (config, file) = stored.unzip();
    let place = place(path, config.as_deref(), file.as_deref());
    let checked = py.detach(|| adapters::check_paced(place, &shape.inner, limits, base, &pace));
    let inner = checked.map_err(|error| of_adapter(&error))?;
    Ok(Receipt { inner })
}

/// Packs a registered adapter into `dst_nbytes` writable bytes at `dst_ptr`.
///
/// The caller keeps that memory alive and to itself until the call returns.
#[pyfunction]
#[pyo3(signature = (path, shape, dtype, max_lora_rank, expected_hash, dst_ptr, dst_nbytes, pace=None, base_linears=None, stored=None, base_weights=None, known=None, adapter_dtype="auto"))]
fn load_adapter(
    py: Python<'_>,
    path: &str,
    shape: &BaseShape,
    dtype: &str,
    max_lora_rank: usize,
    expected_hash: &str,
    dst_ptr: usize,
    dst_nbytes: usize,
    pace: Option<&LoadPace>,
    base_linears: Option<&Bound<'_, PyAny>>,
    stored: Option<(String, String)>,
    base_weights: Option<Py<PyAny>>,
    known: Option<&Receipt>,
    adapter_dtype: &str,
) -> PyResult<AdapterLayout> {
    let limits = limits((dtype, adapter_dtype), max_lora_rank)?;
    if dst_ptr == 0 || isize::try_from(dst_nbytes).is_err() {
        return Err(PyValueError::new_err(format!(
            "no extent of {dst_nbytes} bytes at {dst_ptr:#x}"
        )));
    }
    let pace = LoadPace::of(pace);
    let linears = base_linears.map(BaseLinears::new);
    let weights = base_weights.map(BaseFunction);
    let base = BaseModel {
        linears: linears
            .as_ref()
            .map(|base| base as &dyn adapters::BaseLinears),
        weights: weights.as_ref().map(|base| base as &dyn BaseWeights),
    };
    let registered = Registered {
        hash: expected_hash,
        rows: known.map(|receipt| &receipt.inner.replaced_rows),
    };
    let (config, weights) = stored.unzip();
    let place = place(path, config.as_deref(), weights.as_deref());
    let loaded = py.detach(|| {
        // SAFETY: the caller guarantees dst_nbytes writable bytes at dst_ptr that nobody else
        // reads or writes until this call returns; null and oversized lengths are refused above.
        let extent = unsafe { std::slice::from_raw_parts_mut(dst_ptr as *mut u8, dst_nbytes) };
        adapters::load_paced(place, &shape.inner, limits, registered, extent, base, &pace)
    });
    let inner = Arc::new(loaded.map_err(|error| of_adapter(&error))?);
    Ok(AdapterLayout { inner })
}

/// What the file at `path` is in place of what was expected, in words that follow "it is".
#[pyfunction]
#[pyo3(signature = (path, is_json=false))]
fn recognise_file(path: &str, is_json: bool) -> Option<String> {
    let expected = if is_json {
        Expected::Json
    } else {
        Expected::Binary
    };
    adapters::recognise_file(Path::new(path), expected)
}

/// The digests that `base_weights` gives: of the rows in `nbytes` readable bytes at `ptr`, which stay as they are.
#[pyfunction]
fn row_digests(
    py: Python<'_>,
    ptr: usize,
    nbytes: usize,
    row_nbytes: usize,
) -> PyResult<Bound<'_, PyBytes>> {
    let is_whole = row_nbytes > 0 && nbytes.is_multiple_of(row_nbytes);
    if ptr == 0 || isize::try_from(nbytes).is_err() || !is_whole {
        return Err(PyValueError::new_err(format!(
            "no weight of {nbytes} bytes at {ptr:#x} in rows of {row_nbytes}"
        )));
    }
    let digests = py.detach(|| {
        // SAFETY: the caller guarantees nbytes readable bytes at ptr that nobody writes until this call
        // returns; null and oversized lengths are refused above.
        let bytes = unsafe { std::slice::from_raw_parts(ptr as *const u8, nbytes) };
        adapters::row_digests(bytes, row_nbytes)
    });
    Ok(PyBytes::new(py, &digests))
}

/// A directory, or what is stored for it: the text of a config, and where the weights are read.
fn place<'a>(path: &'a str, config: Option<&'a str>, weights: Option<&'a str>) -> Place<'a> {
    match (config, weights) {
        (Some(config), Some(weights)) => Place::File {
            weights: Path::new(weights),
            config,
            name: path,
        },
        _ => Place::Directory(Path::new(path)),
    }
}

fn limits((dtype, adapter_dtype): (&str, &str), max_lora_rank: usize) -> PyResult<Limits> {
    let Some(dtype) = StorageDtype::parse(dtype) else {
        let message = format!("dtype is '{dtype}', expected 'float32', 'bfloat16' or 'float16'");
        return Err(PyValueError::new_err(message));
    };
    let Some(factors) = FactorDtype::parse(adapter_dtype) else {
        let message = format!("adapter_dtype is '{adapter_dtype}', expected 'auto' or 'int8'");
        return Err(PyValueError::new_err(message));
    };
    Ok(Limits {
        dtype,
        factors,
        max_lora_rank,
    })
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Receipt>()?;
    m.add_class::<LoadPace>()?;
    m.add_function(wrap_pyfunction!(check_adapter, m)?)?;
    m.add_function(wrap_pyfunction!(recognise_file, m)?)?;
    m.add_function(wrap_pyfunction!(row_digests, m)?)?;
    m.add_function(wrap_pyfunction!(load_adapter, m)?)
}
