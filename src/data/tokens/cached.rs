//! Items with texts → what is made of their tokens, by all threads or from the cache.

use anyhow::anyhow;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Tokenizer;
use crate::Result;
use crate::data::cache::{Cache, Key};
use crate::data::in_order;

impl Tokenizer {
    /// The same tokenizer, which keeps what is made of its tokens, and reads what was made before.
    pub fn cached_in(self, cache: Option<&Cache>) -> Self {
        Self { cache: cache.cloned(), ..self }
    }

    /// As [`in_order()`], of items whose texts this tokenizer is to tokenize. `of` names all that is done with them, and
    /// `texts` gives each item's: what was made of the same before is taken from the cache, where there is one.
    ///
    /// # Errors
    /// The first that `take` gives.
    pub fn in_order<I: Sync, O: Send + Serialize + DeserializeOwned>(
        &self,
        of: &str,
        items: &[I],
        texts: impl Fn(&I, &mut Key),
        make: impl Fn(&I) -> Result<O> + Sync,
        take: impl FnMut(usize, Result<O>) -> Result<()>,
    ) -> Result<()> {
        let Some(cache) = &self.cache else { return in_order(items, make, take) };
        let own = self.inner.to_string(false).map_err(|error| anyhow!(error))?;
        let beside = (self.inner.get_encode_special_tokens(), self.direction, self.unknown, self.rows);
        let pairs = (self.token_types, self.pair_types);
        let mut key = Key::new(&format!("{of} {beside:?} {pairs:?} {own}"));
        items.iter().for_each(|item| texts(item, &mut key));
        cache.in_order(key, items, make, take)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::data::batch::Encoding;

    #[test]
    fn another_tokenizer_finds_nothing_of_the_first() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bert-single");
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(dir.path().join("tk"), 1, Default::default());
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(models.join("tokenizer.json")).unwrap()).unwrap();
        let texts = ["good", "bad", "good bad"];
        let encoded = |tokenizer: &Tokenizer| {
            let mut encodings: Vec<Encoding> = Vec::new();
            let encode = |text: &&str| tokenizer.encode(text, None, 9);
            let own = |text: &&str, key: &mut Key| key.add(Some(text));
            let take = |_, encoding: Result<Encoding>| {
                encodings.push(encoding?);
                Ok(())
            };
            tokenizer.in_order("test", &texts, own, encode, take).unwrap();
            encodings
        };
        let mut of = |good: &str, bad: &str| {
            let ids = [good, bad].map(|word| json["model"]["vocab"][word].clone());
            json["model"]["vocab"]["good"] = ids[0].clone();
            json["model"]["vocab"]["bad"] = ids[1].clone();
            std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
            let plain = Tokenizer::open(dir.path()).unwrap();
            let wanted = encoded(&plain);
            let cached = plain.cached_in(Some(&cache));
            assert_eq!(encoded(&cached), wanted, "made");
            assert_eq!(encoded(&cached), wanted, "read");
            wanted
        };
        assert_ne!(of("good", "bad"), of("bad", "good"));
        assert_eq!(dir.path().join("tk").read_dir().unwrap().count(), 2);
    }
}
