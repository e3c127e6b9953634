//! The vocabulary: what a model definition may say, and the names of the weights it says it with.
//!
//! A definition is a function over [`Ops`]. It names weights and composes verbs; it never sees a
//! batch, a length, a dtype, a device or a mode, so it cannot bake one into a graph. Interpreters
//! give the verbs their meaning: [`crate::model::manifest`] lists the parameters,
//! [`crate::eager`] computes with candle, [`crate::onnx::emit`] writes ONNX nodes.
//!
//! Letters: B sequences in a batch, T tokens, C channels, H heads, D channels of a head, V vocabulary.

use crate::Result;

/// Where a module's weights stand: a prefix of Hugging Face parameter names.
///
/// ```
/// # use tk::model::ops::At;
/// let layer = At::body("bert").to("encoder.layer.0");
/// assert_eq!(layer.to("attention.self.query").linear(8, 8).weight.name,
///            "bert.encoder.layer.0.attention.self.query.weight");
/// ```
#[derive(Clone, Debug)]
pub struct At {
    prefix: String,
    part: Part,
}

/// Which part of a model a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The pre-trained network: missing from a checkpoint, it is an error.
    Body,
    /// What a task puts on top: missing from a checkpoint, it is initialised and said so.
    Head,
    /// The last map of a head, whose rows are labels: it is never taken from a model of other labels.
    Labels,
    /// What stands beside the pre-trained network to change it: see [`super::lora`].
    Adapter,
}

/// What a parameter is to its verb. Decides how it is initialised and whether weight decay applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A table of embeddings.
    Table,
    /// The matrix of a linear map.
    Matrix,
    /// A bias: starts at 0, never decays.
    Bias,
    /// A layer norm's scale: starts at 1, never decays.
    Scale,
    /// The first matrix of a low-rank map: starts as a linear layer of PyTorch's does.
    LoraA,
    /// The second one: starts at 0, so that the map changes nothing at first.
    LoraB,
}

impl Role {
    /// Whether AdamW's weight decay applies; biases and layer norms are left out, as `transformers` does.
    pub fn decays(self) -> bool {
        !matches!(self, Role::Bias | Role::Scale)
    }
}

/// One parameter as its definition states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// The Hugging Face name.
    pub name: String,
    /// The shape it has in a checkpoint.
    pub shape: Vec<usize>,
    pub role: Role,
    pub part: Part,
    /// How many maps of this kind add to one residual stream: it is drawn with a standard deviation that is smaller
    /// by the square root (Radford et al. 2019, GPT-2). 1 for all others.
    pub summands: usize,
}

impl Param {
    /// How many numbers it holds.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A table of embeddings, (rows, C).
#[derive(Clone, Debug)]
pub struct Table {
    pub weight: Param,
}

impl Table {
    /// The map to scores of its rows by the same weight: a tied head, (C) → (rows), without a bias of its own.
    pub fn tied(&self) -> Linear {
        Linear { weight: self.weight.clone(), bias: None, layout: Layout::OutIn }
    }
}

/// How a linear map's matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// (out, in), as in `torch.nn.Linear`: `y = x · Wᵀ + b`.
    OutIn,
    /// (in, out), as in `transformers`' `Conv1D`: `y = x · W + b`.
    InOut,
}

/// A linear map, with a bias or without.
#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Param,
    pub bias: Option<Param>,
    pub layout: Layout,
}

impl Linear {
    /// The channels that go in.
    pub fn input(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.weight.shape[1],
            Layout::InOut => self.weight.shape[0],
        }
    }

    /// The channels that come out.
    pub fn output(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.weight.shape[0],
            Layout::InOut => self.weight.shape[1],
        }
    }

    /// The same map with a bias that stands elsewhere.
    pub fn with_bias(self, bias: Param) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// The same map without a bias.
    pub fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }

    /// The same map with its bias, or without it.
    pub fn biased(self, is: bool) -> Self {
        Self { bias: self.bias.filter(|_| is), ..self }
    }

    /// One of so many maps that add to one residual stream; see [`Param::summands`].
    pub fn one_of(mut self, summands: usize) -> Self {
        self.weight.summands = summands;
        self
    }
}

/// Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450), biased variance; with a bias or without.
#[derive(Clone, Debug)]
pub struct Norm {
    pub weight: Param,
    pub bias: Option<Param>,
    pub eps: f64,
}

impl Norm {
    /// The same with a bias, or without one.
    pub fn biased(self, is: bool) -> Self {
        Self { bias: self.bias.filter(|_| is), ..self }
    }
}

impl At {
    /// The root of a pre-trained body, e.g. `bert`.
    pub fn body(name: &str) -> Self {
        Self { prefix: name.to_owned(), part: Part::Body }
    }

    /// The root of a task's head, e.g. `classifier`.
    pub fn head(name: &str) -> Self {
        Self { prefix: name.to_owned(), part: Part::Head }
    }

    /// The map of a head whose rows are a task's labels, e.g. `classifier`.
    pub fn labels(name: &str) -> Self {
        Self { prefix: name.to_owned(), part: Part::Labels }
    }

    /// A module inside this one. The name is Hugging Face's, written literally where it is used.
    pub fn to(&self, name: &str) -> Self {
        Self { prefix: format!("{}.{name}", self.prefix), part: self.part }
    }

    /// The `index`-th of a list of modules.
    pub fn item(&self, index: usize) -> Self {
        self.to(&index.to_string())
    }

    /// The prefix, as in the checkpoint.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    fn param(&self, leaf: &str, shape: &[usize], role: Role) -> Param {
        Param {
            name: format!("{}.{leaf}", self.prefix),
            shape: shape.to_vec(),
            role,
            part: self.part,
            summands: 1,
        }
    }

    /// The bias that stands here by itself, beside a map that is tied.
    pub fn bias(&self, width: usize) -> Param {
        self.param("bias", &[width], Role::Bias)
    }

    /// The embedding table that stands here.
    pub fn table(&self, rows: usize, width: usize) -> Table {
        Table { weight: self.param("weight", &[rows, width], Role::Table) }
    }

    /// The linear map that stands here.
    pub fn linear(&self, input: usize, output: usize) -> Linear {
        Linear {
            weight: self.param("weight", &[output, input], Role::Matrix),
            bias: Some(self.param("bias", &[output], Role::Bias)),
            layout: Layout::OutIn,
        }
    }

    /// The `Conv1D` of `transformers` that stands here: a linear map whose matrix is stored (in, out).
    pub fn conv1d(&self, input: usize, output: usize) -> Linear {
        Linear {
            weight: self.param("weight", &[input, output], Role::Matrix),
            layout: Layout::InOut,
            ..self.linear(input, output)
        }
    }

    /// The layer norm that stands here.
    pub fn norm(&self, width: usize, eps: f64) -> Norm {
        Norm {
            weight: self.param("weight", &[width], Role::Scale),
            bias: Some(self.param("bias", &[width], Role::Bias)),
            eps,
        }
    }
}

/// What is looked up in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// The tokens' ids.
    Tokens,
    /// 0 for the first text's tokens, 1 for the second's.
    TokenTypes,
    /// 0, 1, 2 … in every sequence.
    Positions,
    /// RoBERTa's positions, which are found in the tokens: `padding` + 1, + 2 … for the tokens of a sequence, and
    /// `padding` for each that is the token of padding and is not counted (`create_position_ids_from_input_ids` in
    /// `transformers`).
    PositionsBehind { padding: u32 },
    /// 0 for every token.
    Zero,
}

/// Which keys a query sees. An intent: each interpreter turns it into what it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sees {
    /// Every token of its own sequence.
    All,
    /// Every token of its own sequence up to itself.
    Causal,
    /// The tokens of its own sequence that are at most so far away, on both sides.
    Near { reach: usize },
}

/// How attention is to be computed: `softmax(q · kᵀ / √D) · v` (Vaswani et al. 2017, arXiv:1706.03762).
#[derive(Clone, Copy, Debug)]
pub struct Attend {
    pub heads: usize,
    pub sees: Sees,
    /// Where only one token of every sequence asks: which. Its queries have gone through [`Ops::pick`].
    pub queries: Option<Pick>,
    /// The probability with which an attention weight is dropped in training.
    pub dropout: f32,
}

/// What attention's scores take from the distance between query and key.
#[derive(Clone, Debug)]
pub enum Distances<X> {
    /// Nothing: places are in the embeddings.
    Nothing,
    /// A number a head, of the distance's row of a table, (R, H), is added to the scaled score.
    Bias { table: Table, buckets: Buckets, longest: usize },
    /// Queries and keys are turned by their positions (Su et al. 2021, arXiv:2104.09864): the channels of a head's first
    /// half with those of its second, each pair at its own speed.
    Rotary { theta: f64 },
    /// The products of queries with rows of one table and of keys with rows of another, (R, H·D) each, the distance's
    /// row; `(q · k + q · keys[row] + k · queries[row]) / √(D · summands)` (He et al. 2020, arXiv:2006.03654).
    Products { keys: Option<X>, queries: Option<X>, buckets: Buckets, longest: usize },
}

/// Which row of a table a distance, query − key, has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buckets {
    /// T5's 32 (Raffel et al. 2019, arXiv:1910.10683), 16 for either side: distances below 8 have their own, those up to
    /// 128 share the others by their logarithms.
    T5,
    /// DeBERTa's: row `span` is that of no distance, the row of a positive one is behind it. Distances up to half of the
    /// span have their own, those up to `most` share the others by their logarithms. Without `most` each has its own, and
    /// those that are too far share the last.
    Signed { span: usize, most: Option<usize> },
}

impl Buckets {
    /// The row of a distance. Logarithms are taken in f32, as `transformers` takes them.
    pub fn row(self, distance: i64) -> u32 {
        let far = distance.unsigned_abs();
        match self {
            Self::T5 => {
                let side = if distance < 0 { 16 } else { 0 };
                let log = |far: u64| ((far as f32 / 8.0).ln() / 16f32.ln() * 8.0) as u32;
                side + if far < 8 { far as u32 } else { (8 + log(far)).min(15) }
            }
            Self::Signed { span, most } => {
                let middle = span as u64 / 2;
                let bucket = match most {
                    Some(most) if far > middle => {
                        let (middle, most) = (middle as f32, (most as f32 - 1.0) / middle as f32);
                        let log = (far as f32 / middle).ln() / most.ln() * (middle - 1.0);
                        (log.ceil() + middle) as i64 * distance.signum()
                    }
                    _ => distance,
                };
                (bucket + span as i64).clamp(0, 2 * span as i64 - 1) as u32
            }
        }
    }

    /// The rows of all distances inside sequences of so many tokens, from the largest negative one up.
    pub fn by_distance(self, longest: usize) -> Vec<u32> {
        let largest = longest as i64 - 1;
        (-largest..=largest).map(|distance| self.row(distance)).collect()
    }
}

/// The speeds at which [`Distances::Rotary`] turns a head's pairs of channels, (D / 2): radians a position.
pub fn speeds(theta: f64, d: usize) -> Vec<f32> {
    (0..d / 2).map(|pair| (1.0 / theta.powf(2.0 * pair as f64 / d as f64)) as f32).collect()
}

/// Sines and cosines of the angles at every position, (L, D / 2). Angles are products in f32, as `transformers` has them.
pub fn turn_by(theta: f64, d: usize, longest: usize) -> Vec<(f32, f32)> {
    let speeds = speeds(theta, d);
    let angles = (0..longest).flat_map(|at| speeds.iter().map(move |speed| at as f32 * speed));
    angles.map(|angle| f64::from(angle).sin_cos()).map(|(sin, cos)| (sin as f32, cos as f32)).collect()
}

/// An element-wise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · Φ(x)`, exact (`gelu`).
    Gelu,
    /// Its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    Relu,
    Silu,
    Tanh,
}

/// Which tokens of a sequence go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// The first: BERT's `[CLS]`.
    First,
    /// The last: what has seen all of a causal model's sequence.
    Last,
    /// Those that the batch asks for, of any number a sequence; all of them where it asks for none in particular, and in
    /// graphs.
    Asked,
}

/// How the tokens of a sequence become one row, as `sentence-transformers` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// Their sum by the square root of their number.
    MeanSqrtLength,
    /// Their mean, where the first counts once, the second twice, and so on (Muennighoff 2022, arXiv:2202.08904).
    WeightedMean,
    /// The largest number of each channel.
    Max,
}

/// The vocabulary of model definitions.
///
/// `X` is an activation. Between `embed` and `pick` it stands for every token of the batch, (…, C);
/// after `pick` or `pool` for one row a sequence, (B, C), or one a token that is asked for.
pub trait Ops {
    type X: Clone;

    /// Looks rows up in a table: (T) ids → (T, C).
    fn embed(&self, table: Table, ids: Ids) -> Result<Self::X>;

    /// A table as it is, (R, C): rows that are no tokens', for [`Distances::Products`].
    fn whole(&self, table: Table) -> Result<Self::X>;

    /// Applies a linear map to the last axis: (…, in) → (…, out).
    fn linear(&self, map: Linear, x: &Self::X) -> Result<Self::X>;

    /// Cuts the last axis into equal parts: (…, n · C) → n times (…, C).
    fn split(&self, x: &Self::X, parts: usize) -> Result<Vec<Self::X>>;

    /// Normalises the last axis.
    fn layer_norm(&self, norm: Norm, x: &Self::X) -> Result<Self::X>;

    /// Multi-head attention inside every sequence: three times (T, H·D) → (T, H·D). Where one token of every sequence
    /// asks, q and the result are (B, H·D).
    fn attention(&self, q: &Self::X, k: &Self::X, v: &Self::X, how: Attend) -> Result<Self::X> {
        self.attention_by_distance(q, k, v, how, Distances::Nothing)
    }

    /// The same where the distance between tokens counts.
    fn attention_by_distance(
        &self,
        q: &Self::X,
        k: &Self::X,
        v: &Self::X,
        how: Attend,
        distances: Distances<Self::X>,
    ) -> Result<Self::X>;

    /// Applies a non-linearity to every element.
    fn activate(&self, x: &Self::X, how: Activation) -> Result<Self::X>;

    /// Multiplies the second half of the last axis with a non-linearity of the first: (…, 2·C) → (…, C) (Shazeer 2020,
    /// arXiv:2002.05202).
    fn gated(&self, x: &Self::X, how: Activation) -> Result<Self::X>;

    /// The sum of two activations of one shape.
    fn add(&self, a: &Self::X, b: &Self::X) -> Result<Self::X>;

    /// Multiplies every element with a number.
    fn scale(&self, x: &Self::X, factor: f64) -> Result<Self::X>;

    /// Drops elements with probability `p` in training and scales the rest by 1 / (1 − p).
    fn dropout(&self, x: &Self::X, p: f32) -> Result<Self::X>;

    /// Keeps one token of every sequence: (T, C) → (B, C); or those that are asked for.
    fn pick(&self, x: &Self::X, which: Pick) -> Result<Self::X>;

    /// Makes one row of the tokens of every sequence: (T, C) → (B, C).
    fn pool(&self, x: &Self::X, how: Pooling) -> Result<Self::X>;

    /// Divides each row by its Euclidean norm, or by 1e-12 where that is larger: `torch.nn.functional.normalize`.
    fn normalize(&self, x: &Self::X) -> Result<Self::X>;

    /// Names an intermediate result, so that runtimes can be compared there. Returns it unchanged.
    fn tap(&self, name: &str, x: Self::X) -> Result<Self::X>;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `relative_position_bucket` of MPNet's encoder and `make_log_bucket_position` of DeBERTa's in transformers 4.57 say
    /// so, at the powers of two too, where a logarithm is all but an integer.
    #[test]
    fn rows_of_distances_are_those_of_transformers() {
        let rows = |buckets: Buckets, distances: &[i64]| -> Vec<u32> {
            distances.iter().map(|&distance| buckets.row(distance)).collect()
        };
        T5_ROWS.iter().for_each(|&(distance, row)| assert_eq!(Buckets::T5.row(distance), row, "{distance}"));
        let deberta = Buckets::Signed { span: 256, most: Some(512) };
        SIGNED_ROWS.iter().for_each(|&(distance, row)| assert_eq!(deberta.row(distance), row, "{distance}"));
        let plain = Buckets::Signed { span: 4, most: None };
        assert_eq!(rows(plain, &[-9, -4, -1, 0, 1, 3, 4, 9]), [0, 0, 3, 4, 5, 7, 7, 7]);
        assert_eq!(plain.by_distance(3), [2, 3, 4, 5, 6]);
    }

    const T5_ROWS: &[(i64, u32)] = &[
        (-500, 31),
        (-129, 31),
        (-128, 31),
        (-127, 31),
        (-91, 31),
        (-90, 30),
        (-65, 30),
        (-64, 30),
        (-63, 29),
        (-46, 29),
        (-45, 28),
        (-33, 28),
        (-32, 28),
        (-31, 27),
        (-20, 26),
        (-17, 26),
        (-16, 26),
        (-15, 25),
        (-8, 24),
        (-7, 23),
        (0, 0),
        (7, 7),
        (8, 8),
        (15, 9),
        (16, 10),
        (17, 10),
        (20, 10),
        (31, 11),
        (32, 12),
        (33, 12),
        (45, 12),
        (46, 13),
        (63, 13),
        (64, 14),
        (65, 14),
        (90, 14),
        (91, 15),
        (127, 15),
        (128, 15),
        (129, 15),
        (500, 15),
    ];
    const SIGNED_ROWS: &[(i64, u32)] = &[
        (-600, 0),
        (-512, 0),
        (-511, 1),
        (-510, 1),
        (-400, 23),
        (-300, 49),
        (-257, 64),
        (-256, 64),
        (-255, 64),
        (-200, 87),
        (-150, 113),
        (-130, 126),
        (-129, 127),
        (-128, 128),
        (-127, 129),
        (-1, 255),
        (0, 256),
        (1, 257),
        (127, 383),
        (128, 384),
        (129, 385),
        (130, 386),
        (150, 399),
        (200, 425),
        (255, 448),
        (256, 448),
        (257, 448),
        (300, 463),
        (400, 489),
        (510, 511),
        (511, 511),
        (512, 511),
        (600, 511),
    ];
}
