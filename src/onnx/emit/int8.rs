//! Products in int8, in ONNX's own operators: activations are rounded to bytes as they come (DynamicQuantizeLinear),
//! multiplied as integers, and scaled back. ONNX Runtime makes one operator of it when it loads the graph.

use super::{Emit, X};
use crate::Result;
use crate::model::ops::{Layout, Linear, Role, Table};
use crate::onnx::Precision;
use crate::onnx::graph::{ValueId, int};
use crate::onnx::int8::{LEAST_OUTPUTS, Rounding};
use crate::onnx::proto::tensor_proto::DataType;

impl Emit {
    /// Whether a weight is stored in int8.
    pub(super) fn is_int8(&self, name: &str) -> bool {
        self.kind.precision == Precision::Int8 && !self.kind.kept.iter().any(|kept| kept == name)
    }

    /// Whether a linear map is computed in int8.
    pub(super) fn multiplies_in_int8(&self, map: &Linear) -> bool {
        self.is_int8(&map.weight.name) && map.output() >= LEAST_OUTPUTS
    }

    /// x as bytes, with their scale and their zero, once for all who read it.
    fn rounded(&self, x: &X) -> Vec<ValueId> {
        const ROUND: &str = "DynamicQuantizeLinear";
        let mut graph = self.graph.borrow_mut();
        let known = graph.outputs_of(ROUND, &[x.value]);
        known.unwrap_or_else(|| graph.node_of(&x.scope, ROUND, &[x.value], Vec::new(), 3))
    }

    /// x · W + b with W in int8.
    pub(super) fn product_in_int8(&self, scope: &str, map: &Linear, x: &X) -> Result<ValueId> {
        let rounding = Rounding { channels: map.output(), layout: map.layout, multiplied: true };
        let table = map.weight.role == Role::Table && map.layout == Layout::OutIn;
        let (mut numbers, mut scales) = self.graph.borrow_mut().in_int8(&map.weight, rounding)?;
        if table {
            // both are computed when the graph is loaded
            numbers = self.transpose(scope, numbers, &[1, 0]);
            scales = self.plain(scope, "Reshape", &[scales, self.list(&[-1])]);
        }
        let rounded = self.rounded(x); // the bytes, their scale, their zero
        let product = self.plain(scope, "MatMulInteger", &[rounded[0], numbers, rounded[2]]);
        let product = self.float(scope, product);
        let scale = self.plain(scope, "Mul", &[rounded[1], scales]);
        let value = self.plain(scope, "Mul", &[product, scale]);
        Ok(match &map.bias {
            Some(bias) => self.plain(scope, "Add", &[value, self.param(bias)?]),
            None => value,
        })
    }

    /// Rows of a table in int8, which may be a head's matrix too.
    pub(super) fn rows_in_int8(&self, scope: &str, table: &Table, ids: ValueId) -> Result<ValueId> {
        let channels = table.weight.shape[0];
        let rounding = Rounding { channels, layout: Layout::OutIn, multiplied: false };
        let (numbers, scales) = self.graph.borrow_mut().in_int8(&table.weight, rounding)?;
        let rows_of = |table| self.node(scope, "Gather", &[table, ids], vec![int("axis", 0)]);
        let rows = self.float(scope, rows_of(numbers)); // (B, T, C)
        Ok(self.plain(scope, "Mul", &[rows, rows_of(scales)])) // (B, T, 1)
    }

    fn float(&self, scope: &str, x: ValueId) -> ValueId {
        self.node(scope, "Cast", &[x], vec![int("to", DataType::Float as i64)])
    }
}
