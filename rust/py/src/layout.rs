//! `AdapterLayout` for Python: where an adapter's weights lie in its extent.

use std::sync::Arc;

use loraserve_adapters::{
    self as adapters, ColumnsLayout, GroupLayout, ModuleLayout, NUM_GROUPS, RowsLayout,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// (`rank_offset`, rank, `b_offset`, `out_offset`, `out_features`, scale).
type ModuleLayoutTuple = (usize, usize, usize, usize, usize, f32);
/// (layer, group, `a_offset`, rank, `in_features`, modules).
type GroupTuple = (usize, usize, usize, usize, usize, Vec<ModuleLayoutTuple>);
/// (layer, group, `out_offset`, offset, `has_gain`, `has_shift`).
type ColumnsTuple = (usize, usize, usize, usize, bool, bool);
/// (layer, group, offset) of a group in int8.
type ScalesTuple = (usize, usize, usize);

/// (`tokens_offset`, `panels_offset`, count, width).
type RowsTuple = (usize, usize, usize, usize);

/// Where an adapter's packed weights lie inside its extent.
#[pyclass(frozen, module = "loraserve._core")]
pub struct AdapterLayout {
    pub inner: Arc<adapters::AdapterLayout>,
}

#[pymethods]
impl AdapterLayout {
    /// Builds a layout from what `groups()`, `columns()`, `embedding`, `head`, `vocabulary` and `scales()` return.
    #[staticmethod]
    #[pyo3(signature = (groups, num_layers, nbytes, columns=Vec::new(), embedding=None, head=None, vocabulary=None, scales=Vec::new()))]
    fn from_groups(
        groups: Vec<GroupTuple>,
        num_layers: usize,
        nbytes: usize,
        columns: Vec<ColumnsTuple>,
        embedding: Option<RowsTuple>,
        head: Option<RowsTuple>,
        vocabulary: Option<usize>,
        scales: Vec<ScalesTuple>,
    ) -> PyResult<Self> {
        let mut slots = vec![None; num_layers * NUM_GROUPS];
        for group in groups {
            let (layer, index) = (group.0, group.1);
            if layer >= num_layers || index >= NUM_GROUPS {
                let message = format!(
                    "no group {index} of layer {layer}: there are {num_layers} layers of {NUM_GROUPS}"
                );
                return Err(PyValueError::new_err(message));
            }
            slots[layer * NUM_GROUPS + index] = Some(group_layout(group));
        }
        for (layer, group, offset) in scales {
            let slot = slots.get_mut(layer * NUM_GROUPS + group);
            let group = slot.and_then(Option::as_mut).ok_or_else(|| {
                PyValueError::new_err(format!("there is no group {group} of layer {layer}"))
            })?;
            group.scales_offset = Some(offset);
        }
        for (layer, group, out_offset, offset, has_gain, has_shift) in columns {
            let slot = slots.get_mut(layer * NUM_GROUPS + group);
            let modules = slot
                .and_then(Option::as_mut)
                .map(|group| &mut group.modules);
            let module = modules
                .and_then(|modules| modules.iter_mut().find(|m| m.out_offset == out_offset))
                .ok_or_else(|| {
                    let message = format!(
                        "no module of group {group} of layer {layer} begins at column {out_offset}"
                    );
                    PyValueError::new_err(message)
                })?;
            module.columns = Some(ColumnsLayout {
                offset,
                has_gain,
                has_shift,
            });
        }
        let inner = Arc::new(adapters::AdapterLayout {
            groups: slots,
            embedding: embedding.map(rows_layout),
            head: head.map(rows_layout),
            embedding_lora: None,
            head_lora: None,
            norms: Vec::new(),
            vocabulary,
            nbytes,
        });
        Ok(Self { inner })
    }

    /// For `from_json` of another process.
    fn to_json<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_json())
    }

    /// Raises `ValueError`.
    #[staticmethod]
    fn from_json(data: &[u8]) -> PyResult<Self> {
        let inner = adapters::AdapterLayout::from_json(data).map_err(PyValueError::new_err)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }

    #[getter]
    fn embedding(&self) -> Option<RowsTuple> {
        self.inner.embedding.map(rows_tuple)
    }

    #[getter]
    fn head(&self) -> Option<RowsTuple> {
        self.inner.head.map(rows_tuple)
    }

    #[getter]
    fn vocabulary(&self) -> Option<usize> {
        self.inner.vocabulary
    }

    fn groups(&self) -> Vec<GroupTuple> {
        self.inner.present().map(group_tuple).collect()
    }

    fn scales(&self) -> Vec<ScalesTuple> {
        let groups = self.inner.present();
        let of_int8 = groups.filter_map(|(layer, group, layout)| {
            layout.scales_offset.map(|offset| (layer, group, offset))
        });
        of_int8.collect()
    }

    fn columns(&self) -> Vec<ColumnsTuple> {
        let groups = self.inner.present();
        let tuples = groups.flat_map(|(layer, group, layout)| {
            layout.modules.iter().filter_map(move |m| {
                let columns = m.columns?;
                let (has_gain, has_shift) = (columns.has_gain, columns.has_shift);
                Some((
                    layer,
                    group,
                    m.out_offset,
                    columns.offset,
                    has_gain,
                    has_shift,
                ))
            })
        });
        tuples.collect()
    }
}

fn rows_layout((tokens_offset, panels_offset, count, width): RowsTuple) -> RowsLayout {
    RowsLayout {
        tokens_offset,
        panels_offset,
        count,
        width,
    }
}

fn rows_tuple(rows: RowsLayout) -> RowsTuple {
    (
        rows.tokens_offset,
        rows.panels_offset,
        rows.count,
        rows.width,
    )
}

fn group_layout((_, _, a_offset, rank, in_features, modules): GroupTuple) -> GroupLayout {
    let modules = modules
        .into_iter()
        .map(
            |(rank_offset, rank, b_offset, out_offset, out_features, scale)| ModuleLayout {
                rank_offset,
                rank,
                b_offset,
                columns: None,
                out_offset,
                out_features,
                scale,
            },
        )
        .collect();
    GroupLayout {
        a_offset,
        rank,
        in_features,
        scales_offset: None,
        modules,
    }
}

fn group_tuple((layer, group, layout): (usize, usize, &GroupLayout)) -> GroupTuple {
    let modules = layout
        .modules
        .iter()
        .map(|m| {
            (
                m.rank_offset,
                m.rank,
                m.b_offset,
                m.out_offset,
                m.out_features,
                m.scale,
            )
        })
        .collect();
    (
        layer,
        group,
        layout.a_offset,
        layout.rank,
        layout.in_features,
        modules,
    )
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<AdapterLayout>()
}
