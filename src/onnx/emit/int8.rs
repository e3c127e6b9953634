//! Products in int8, in ONNX's own operators, of which ONNX Runtime makes one when it loads the graph. Where the range of
//! the activations is not known they are rounded to bytes as they come (DynamicQuantizeLinear), multiplied as integers,
//! and scaled back. Where it is, both sides are rounded and scaled back in front of the product (QuantizeLinear,
//! DequantizeLinear), which other runtimes know as a static quantization.

use super::{Emit, LEAST, MOST, X};
use crate::Result;
use crate::model::ops::{Layout, Linear, Role, Table};
use crate::onnx::graph::{Outlet, ValueId, int};
use crate::onnx::int8::{LEAST_OUTPUTS, Rounding, bytes_of};
use crate::onnx::proto::tensor_proto::DataType;
use crate::onnx::{Precision, Range};

/// Whether a map is large enough to gain something in int8.
pub(super) fn is_worth_it(map: &Linear) -> bool {
    map.output() >= LEAST_OUTPUTS
}

impl Emit {
    /// Whether a weight is stored in int8.
    pub(super) fn is_int8(&self, name: &str) -> bool {
        self.kind.precision == Precision::Int8 && !self.kind.kept.iter().any(|kept| kept == name)
    }

    /// Whether a linear map is computed in int8.
    pub(super) fn multiplies_in_int8(&self, map: &Linear) -> bool {
        self.is_int8(&map.weight.name) && is_worth_it(map)
    }

    /// The least and the largest number of each of the activations that are observed.
    pub(super) fn ranges(&self) -> Vec<Outlet> {
        let of_each = |(weight, read): (String, Vec<ValueId>)| {
            [(LEAST, "ReduceMin", "Min"), (MOST, "ReduceMax", "Max")].map(|(what, op, of_all)| {
                let of_one = |&x: &ValueId| self.node(&weight, op, &[x], vec![int("keepdims", 0)]);
                let value = self.plain(&weight, of_all, &read.iter().map(of_one).collect::<Vec<_>>());
                Outlet { name: format!("{weight}{what}"), kind: DataType::Float, dims: Vec::new(), value }
            })
        };
        self.observed.take().into_iter().flat_map(of_each).collect()
    }

    /// x as bytes, their scale and their zero, once for all who read them.
    fn rounded(&self, x: &X, range: Option<Range>) -> [ValueId; 3] {
        let mut graph = self.graph.borrow_mut();
        match range {
            None => {
                let made = graph.once(&x.scope, "DynamicQuantizeLinear", &[x.value], 3);
                [made[0], made[1], made[2]]
            }
            Some(range) => {
                let (scale, zero) = bytes_of(range);
                let (scale, zero) = (graph.f32(scale), graph.u8(zero));
                [graph.once(&x.scope, "QuantizeLinear", &[x.value, scale, zero], 1)[0], scale, zero]
            }
        }
    }

    /// x · W + b with W in int8.
    pub(super) fn product_in_int8(&self, scope: &str, map: &Linear, x: &X) -> Result<ValueId> {
        let rounding = Rounding { channels: map.output(), layout: map.layout, multiplied: true };
        let range = self.kind.ranges.get(&map.weight.name).copied();
        let table = map.weight.role == Role::Table && map.layout == Layout::OutIn;
        let (mut numbers, mut scales) = self.graph.borrow_mut().in_int8(&map.weight, rounding)?;
        let [bytes, scale, zero] = self.rounded(x, range);
        // of one token a sequence, and of a matrix that has to be transposed, ONNX Runtime would make a product in fp32
        let value = if range.is_some() && x.every && !table {
            let x = self.graph.borrow_mut().once(&x.scope, "DequantizeLinear", &[bytes, scale, zero], 1)[0];
            let weight = self.node(scope, "DequantizeLinear", &[numbers, scales], vec![int("axis", 1)]);
            self.plain(scope, "MatMul", &[x, weight])
        } else {
            if table {
                // both are computed when the graph is loaded
                numbers = self.transpose(scope, numbers, &[1, 0]);
                scales = self.plain(scope, "Reshape", &[scales, self.list(&[-1])]);
            }
            let product = self.plain(scope, "MatMulInteger", &[bytes, numbers, zero]);
            let product = self.float(scope, product);
            self.plain(scope, "Mul", &[product, self.plain(scope, "Mul", &[scale, scales])])
        };
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
