//! How many values a JSON text has, before anything is made of them.

use pyo3::prelude::*;

/// (objects and arrays, commas between values, depth) of a text; what is no JSON is counted as far as it is like it.
#[pyfunction]
fn count_json(py: Python<'_>, data: &[u8]) -> (usize, usize, usize) {
    py.detach(|| count(data))
}

fn count(data: &[u8]) -> (usize, usize, usize) {
    let (mut containers, mut commas, mut depth, mut deepest) = (0, 0, 0_usize, 0);
    let mut position = 0;
    while let Some(&byte) = data.get(position) {
        position += 1;
        match byte {
            b'"' => position = end_of_string(data, position),
            b'{' | b'[' => {
                containers += 1;
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => commas += 1,
            _ => {}
        }
    }
    (containers, commas, deepest)
}

/// The position behind the string whose text begins at `position`.
fn end_of_string(data: &[u8], mut position: usize) -> usize {
    while let Some(&byte) = data.get(position) {
        position += match byte {
            b'"' => return position + 1,
            b'\\' => 2,
            _ => 1,
        };
    }
    data.len()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(count_json, m)?)
}
