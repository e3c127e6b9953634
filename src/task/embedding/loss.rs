//! What embeddings of related texts cost: the losses of `sentence-transformers`, over cosine similarities.

use candle_core::{D, DType, Tensor};

use super::Related;
use crate::Result;
use crate::eager::kernels::pooling::normalize_composite;

/// What similarities are multiplied by in CoSENT.
const SCALE: f64 = 20.0;

/// What is learnt of pairs with a score.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ScoredLoss {
    /// That the similarities of a batch have the order of its scores: `log(1 + Σ exp(20 · (cosᵢ − cosⱼ)))` over all
    /// pairs where i has the lower score (CoSENTLoss).
    #[default]
    Cosent,
    /// That a similarity is the score: the squared difference (CosineSimilarityLoss).
    Cosine,
}

/// What is learnt, of embeddings of which width.
#[derive(Clone, Debug, PartialEq)]
pub struct Regime {
    pub scored: ScoredLoss,
    /// What similarities are divided by in front of the softmax over a batch's texts.
    pub temperature: f64,
    /// How many of the first channels must do as well as all (Kusupati et al. 2022, arXiv:2205.13147); none: all.
    pub dims: Vec<usize>,
}

impl Default for Regime {
    fn default() -> Self {
        Self { scored: ScoredLoss::default(), temperature: 0.05, dims: Vec::new() }
    }
}

impl Regime {
    /// The sum of the examples' losses. `rows` are the embeddings of all their texts, (R, C), an example's one after
    /// another.
    ///
    /// # Errors
    /// There are other rows than texts.
    pub fn sum(&self, rows: &Tensor, examples: &[&Related]) -> Result<Tensor> {
        let rows = rows.to_dtype(DType::F32)?;
        let (texts, width) = rows.dims2()?;
        let due: usize = examples.iter().map(|example| 1 + example.others.len()).sum();
        anyhow::ensure!(texts == due, "the model gives {texts} embeddings of {due} texts");
        if self.dims.is_empty() {
            return self.of(&rows, examples);
        }
        let of_first = |&dim: &usize| self.of(&rows.narrow(1, 0, dim.min(width))?, examples);
        let losses = self.dims.iter().map(of_first).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&losses, 0)?.sum_all()?)
    }

    fn of(&self, rows: &Tensor, examples: &[&Related]) -> Result<Tensor> {
        let rows = normalize_composite(&rows.contiguous()?)?;
        let (mut anchors, mut positives, mut negatives, mut scores) = (vec![], vec![], vec![], vec![]);
        let mut at = 0u32;
        for example in examples {
            let others = example.others.len() as u32;
            anchors.push(at);
            positives.push(at + 1);
            negatives.extend(at + 2..at + 1 + others);
            scores.extend(example.score);
            at += 1 + others;
        }
        let pick = |places: &[u32]| -> Result<Tensor> {
            Ok(rows.index_select(&Tensor::new(places, rows.device())?, 0)?)
        };
        let (first, second) = (pick(&anchors)?, pick(&positives)?);
        if scores.is_empty() {
            let candidates =
                if negatives.is_empty() { second } else { Tensor::cat(&[second, pick(&negatives)?], 0)? };
            return self.ranking(&first, &candidates);
        }
        anyhow::ensure!(scores.len() == examples.len(), "some pairs have a score and others have none");
        let cosines = (first * second)?.sum(D::Minus1)?;
        match self.scored {
            ScoredLoss::Cosine => {
                let wanted = Tensor::new(scores.as_slice(), rows.device())?;
                Ok((cosines - wanted)?.sqr()?.sum_all()?)
            }
            ScoredLoss::Cosent => Ok((cosent(&cosines, &scores)? * scores.len() as f64)?),
        }
    }

    /// The sum of each anchor's cross-entropy: which of all the batch's texts is its own. Its own stands at its place
    /// among the candidates.
    fn ranking(&self, anchors: &Tensor, candidates: &Tensor) -> Result<Tensor> {
        let scores = (anchors.matmul(&candidates.t()?)? / self.temperature)?;
        let own: Vec<u32> = (0..anchors.dim(0)? as u32).collect();
        let own = Tensor::from_vec(own, (anchors.dim(0)?, 1), anchors.device())?;
        let log_p = candle_nn::ops::log_softmax(&scores, D::Minus1)?;
        Ok(log_p.gather(&own, 1)?.sum_all()?.neg()?)
    }
}

/// CoSENT over a batch, one number.
fn cosent(cosines: &Tensor, scores: &[f32]) -> Result<Tensor> {
    let n = scores.len();
    let scaled = (cosines * SCALE)?;
    let differences = scaled.unsqueeze(1)?.broadcast_sub(&scaled.unsqueeze(0)?)?.flatten_all()?;
    // those that are in order already by their scores, or of one score
    let wrong: Vec<u32> =
        (0..n * n).filter(|at| scores[at / n] < scores[at % n]).map(|at| at as u32).collect();
    let zero = Tensor::zeros(1, DType::F32, cosines.device())?;
    if wrong.is_empty() {
        return Ok((differences.sum_all()? * 0.0)?); // a gradient of zero still reaches everything
    }
    let wrong = differences.index_select(&Tensor::new(wrong, cosines.device())?, 0)?;
    Ok(Tensor::cat(&[zero, wrong], 0)?.log_sum_exp(0)?)
}
