//! What the server counts, as Prometheus reads it.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::served::Ask;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    route: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRoute {
    route: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    model: String,
}

/// What the server counts.
pub struct Meter {
    registry: Registry,
    requests: Family<OfRequest, Counter>,
    seconds: Family<OfRoute, Histogram>,
    records: Family<OfModel, Counter>,
    batches: Family<OfModel, Counter>,
    tokens: Family<OfModel, Counter>,
    padded: Family<OfModel, Counter>,
    computing: Family<OfModel, Counter<f64, AtomicU64>>,
    waiting: Family<OfModel, Gauge>,
}

impl Default for Meter {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tk");
        let seconds: Family<OfRoute, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 16)));
        let meter = Self {
            requests: Family::default(),
            seconds,
            records: Family::default(),
            batches: Family::default(),
            tokens: Family::default(),
            padded: Family::default(),
            computing: Family::default(),
            waiting: Family::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests by route and status", meter.requests.clone());
        let help = "From a request's first byte to its answer";
        registry.register_with_unit("request_duration", help, Unit::Seconds, meter.seconds.clone());
        registry.register("records", "Records that a model has answered", meter.records.clone());
        registry.register("batches", "Batches that a model has run", meter.batches.clone());
        registry.register("tokens", "Tokens of these records", meter.tokens.clone());
        let help = "The same with padding: the quotient is the padding ratio";
        registry.register("padded_tokens", help, meter.padded.clone());
        let help = "What batches have taken, over all sessions";
        registry.register_with_unit("computing", help, Unit::Seconds, meter.computing.clone());
        registry.register("waiting_records", "Records that wait for a model", meter.waiting.clone());
        Self { registry, ..meter }
    }
}

impl Meter {
    /// Counts a request.
    pub fn request(&self, route: &'static str, status: u16, took: Duration) {
        self.requests.get_or_create(&OfRequest { route, status }).inc();
        self.seconds.get_or_create(&OfRoute { route }).observe(took.as_secs_f64());
    }

    /// Counts a batch.
    pub fn batch(&self, model: &str, asked: &[&Ask], took: Duration) {
        let of = OfModel { model: model.to_owned() };
        let windows: usize = asked.iter().map(|asked| asked.windows()).sum();
        let longest = asked.iter().map(|asked| asked.longest()).max().unwrap_or_default();
        let tokens: usize = asked.iter().map(|asked| asked.tokens()).sum();
        self.records.get_or_create(&of).inc_by(asked.len() as u64);
        self.batches.get_or_create(&of).inc();
        self.tokens.get_or_create(&of).inc_by(tokens as u64);
        self.padded.get_or_create(&of).inc_by((windows * longest) as u64);
        self.computing.get_or_create(&of).inc_by(took.as_secs_f64());
    }

    /// All of it, as text; `waiting` says how many records wait for each model.
    ///
    /// # Errors
    /// It can't be written.
    pub fn text<'m>(
        &self,
        waiting: impl Iterator<Item = (&'m str, usize)>,
    ) -> Result<String, std::fmt::Error> {
        for (model, count) in waiting {
            self.waiting.get_or_create(&OfModel { model: model.to_owned() }).set(count as i64);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
