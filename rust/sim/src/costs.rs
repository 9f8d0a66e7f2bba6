//! `CostModel`: how long a step takes, by its shape.
//!
//! ```text
//! seconds = rows(T) + sample · L + prompt_pair · P + context_token · C + [G > 0] any_adapter + adapter_byte · A
//!           + adapter_row · R + segment · G + load · N
//! ```
//! `rows` is piecewise linear: few rows wait for the weights, many for the products.

use crate::error::Error;
use crate::step_shape::StepShape;

/// All in seconds; per unit of `StepShape`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CostModel {
    /// (rows, seconds), ascending; below the first its seconds, beyond the last its slope goes on.
    pub rows: Vec<(f64, f64)>,
    pub sample: f64,
    pub prompt_pair: f64,
    pub context_token: f64,
    /// Of a step with an adapter.
    pub any_adapter: f64,
    pub adapter_byte: f64,
    pub adapter_row: f64,
    pub segment: f64,
    pub load: f64,
}

impl CostModel {
    pub fn validate(&self) -> Result<(), Error> {
        let costs = [
            ("sample", self.sample),
            ("prompt_pair", self.prompt_pair),
            ("context_token", self.context_token),
            ("any_adapter", self.any_adapter),
            ("adapter_byte", self.adapter_byte),
            ("adapter_row", self.adapter_row),
            ("segment", self.segment),
            ("load", self.load),
        ];
        for (name, value) in costs {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::BadCost { name, value });
            }
        }
        let Some(&(_, first)) = self.rows.first() else {
            return Err(Error::NoRows);
        };
        let mut before = (-1.0, first.max(0.0));
        for &(rows, seconds) in &self.rows {
            let rises = rows > before.0 && seconds >= before.1;
            if !(rises && rows.is_finite() && seconds.is_finite()) {
                return Err(Error::BadRows { rows, seconds });
            }
            before = (rows, seconds);
        }
        Ok(())
    }

    pub fn seconds(&self, step: &StepShape) -> f64 {
        self.of_rows(step.rows)
            + self.sample * step.samples
            + self.prompt_pair * step.prompt_pairs
            + self.context_token * step.context_tokens
            + self.any_adapter * step.segments.min(1.0)
            + self.adapter_byte * step.adapter_nbytes
            + self.adapter_row * step.adapter_rows
            + self.segment * step.segments
            + self.load * step.loads
    }

    fn of_rows(&self, rows: f64) -> f64 {
        let above = self.rows.partition_point(|&(point, _)| point < rows);
        let above = above.min(self.rows.len() - 1);
        let Some(below) = above.checked_sub(1) else {
            return self.rows[0].1;
        };
        let ((x0, y0), (x1, y1)) = (self.rows[below], self.rows[above]);
        y0 + (rows - x0) / (x1 - x0) * (y1 - y0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs() -> CostModel {
        CostModel {
            rows: vec![(1.0, 4.0), (11.0, 4.0), (21.0, 6.0)],
            sample: 0.5,
            context_token: 0.25,
            any_adapter: 0.125,
            ..CostModel::default()
        }
    }

    #[test]
    fn rows_are_interpolated_and_the_last_slope_goes_on() {
        let of = |rows| costs().of_rows(rows);
        for (rows, seconds) in [(0.0, 4.0), (1.0, 4.0), (5.0, 4.0), (16.0, 5.0), (31.0, 8.0)] {
            assert!((of(rows) - seconds).abs() < 1e-12, "{rows} rows");
        }
        let one = CostModel {
            rows: vec![(8.0, 2.0)],
            ..CostModel::default()
        };
        assert!(
            [1.0, 100.0]
                .iter()
                .all(|&rows| (one.of_rows(rows) - 2.0).abs() < 1e-12)
        );
    }

    #[test]
    fn terms_add_up() {
        let step = StepShape {
            rows: 1.0,
            samples: 2.0,
            context_tokens: 8.0,
            segments: 3.0,
            ..StepShape::default()
        };
        assert!((costs().seconds(&step) - 7.125).abs() < 1e-12);
    }

    #[test]
    fn costs_that_make_no_time_are_refused() {
        assert_eq!(costs().validate(), Ok(()));
        let negative = CostModel {
            segment: -1.0,
            ..costs()
        };
        let falling = CostModel {
            rows: vec![(1.0, 4.0), (2.0, 3.0)],
            ..costs()
        };
        let unordered = CostModel {
            rows: vec![(2.0, 4.0), (1.0, 5.0)],
            ..costs()
        };
        for (costs, expected) in [
            (
                negative,
                "the cost of segment is -1, it must be finite and not negative",
            ),
            (
                falling,
                "the costs of rows must be of ascending numbers of rows and not fall, 2 rows cost 3 s",
            ),
            (
                unordered,
                "the costs of rows must be of ascending numbers of rows and not fall, 1 rows cost 5 s",
            ),
            (
                CostModel::default(),
                "the costs of rows are empty, at least one point is needed",
            ),
        ] {
            assert_eq!(costs.validate().unwrap_err().to_string(), expected);
        }
    }
}
