//! `loraserve_bounds` for Python: how much a body would become.

use std::collections::HashMap;

use loraserve_bounds::json::{self, JsonCounts};
use loraserve_bounds::protobuf::{self, Content, ProtobufCounts, Shape};
use pyo3::prelude::*;

/// (objects and arrays, commas between values, depth) of a text; what is no JSON is counted as far as it is like it.
#[pyfunction]
fn count_json(py: Python<'_>, data: &[u8]) -> (usize, usize, usize) {
    let JsonCounts {
        containers,
        commas,
        depth,
    } = py.detach(|| json::count(data));
    (containers, commas, depth)
}

/// What the fields of a protobuf message hold.
#[pyclass(frozen, module = "loraserve._core")]
struct MessageShape(Shape);

#[pymethods]
impl MessageShape {
    #[new]
    fn new(messages: HashMap<u64, PyRef<'_, Self>>, varints: Vec<u64>) -> Self {
        let messages = messages
            .into_iter()
            .map(|(number, shape)| (number, Content::Message(shape.0.clone())));
        let varints = varints.into_iter().map(|number| (number, Content::Varints));
        Self(Shape(messages.chain(varints).collect()))
    }

    /// (messages and texts, numbers) in the bytes of a message; stops above either limit.
    fn count(
        &self,
        py: Python<'_>,
        data: &[u8],
        max_objects: usize,
        max_numbers: usize,
    ) -> (usize, usize) {
        let limits = ProtobufCounts {
            objects: max_objects,
            numbers: max_numbers,
        };
        let ProtobufCounts { objects, numbers } =
            py.detach(|| protobuf::count(data, &self.0, limits));
        (objects, numbers)
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<MessageShape>()?;
    m.add_function(wrap_pyfunction!(count_json, m)?)
}
