//! The generation engine by its properties: whatever is submitted and cancelled beside a request, and when, its texts are
//! those that it gives alone.

mod common;

use std::collections::{BTreeMap, HashMap};

use common::{copy_dir, floats, models};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;
use tk::data::tokens::Tokenizer;
use tk::generate::{Engine, Generated, GenerationConfig, Limits, News, Request, RequestId};
use tk::runtime::Slots;

const POSITIONS: usize = 1024;
const END: u32 = 406;
const LARGE: Limits = Limits { slots: 32, cache_bytes: 1 << 30 };

/// The tiny model, exported, with more positions: the first ones again and again.
struct Bench {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(&models("tiny-gpt2-lm"), dir.path());
        let (weights, config) = (dir.path().join("model.safetensors"), dir.path().join("config.json"));
        let bytes = std::fs::read(&weights).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors: Vec<(&str, Vec<usize>, Vec<f32>)> = file
            .names()
            .into_iter()
            .map(|name| {
                let (mut shape, mut values) =
                    (file.tensor(name).unwrap().shape().to_vec(), floats(&file, name));
                if name.ends_with("wpe.weight") {
                    values = values.repeat(POSITIONS / shape[0]);
                    shape[0] = POSITIONS;
                }
                (name, shape, values)
            })
            .collect();
        let named = tensors.iter().map(|(name, shape, values)| (*name, &shape[..], &values[..]));
        tk::checkpoint::write_safetensors(&weights, named).unwrap();
        let mut fields = common::json(config.clone());
        fields["n_positions"] = json!(POSITIONS);
        std::fs::write(config, fields.to_string()).unwrap();
        Self { tokenizer: common::exported(dir.path()), dir }
    }

    fn slots(&self) -> Slots {
        common::slots(self.dir.path())
    }

    fn engine(&self, limits: Limits) -> Engine<'_> {
        Engine::new(self.slots(), self.tokenizer.inner(), vec![END], POSITIONS, limits)
    }

    /// What each request gives alone.
    fn alone(&self, requests: &[Request]) -> Vec<Vec<Generated>> {
        let mut engine = self.engine(LARGE);
        let mut run = |request| engine.run(std::slice::from_ref(request), &mut |_| Ok(())).unwrap().remove(0);
        requests.iter().map(&mut run).collect()
    }

    /// Room for so many tokens in a cache.
    fn tokens(&self, tokens: usize) -> usize {
        tokens * self.slots().token_bytes()
    }
}

/// Prompts with tokens of their kind: those of one kind begin alike.
fn prompt(length: usize, kind: usize) -> Vec<u32> {
    (0..length).map(|k| ((k * (7 + kind) + 11 + 31 * kind) % 400) as u32).collect()
}

fn greedy(length: usize, kind: usize, max_new_tokens: usize) -> Request {
    let settings = GenerationConfig { max_new_tokens, ..GenerationConfig::default() };
    Request { prompt: prompt(length, kind), settings }
}

fn searched(length: usize, kind: usize, max_new_tokens: usize, num_beams: usize) -> Request {
    let mut request = greedy(length, kind, max_new_tokens);
    request.settings.num_beams = num_beams;
    request.settings.num_return_sequences = num_beams - 1;
    request
}

fn drawn(length: usize, kind: usize, max_new_tokens: usize, sequences: usize) -> Request {
    let mut request = greedy(length, kind, max_new_tokens);
    request.settings.temperature = 0.8;
    request.settings.num_return_sequences = sequences;
    request
}

/// Requests of all kinds: short and long, alike in front, drawn, of several texts, by beams.
fn pool() -> Vec<Request> {
    vec![
        greedy(1, 0, 30),
        greedy(5, 1, 1),
        greedy(24, 2, 12),
        greedy(60, 2, 20),
        greedy(90, 2, 60),
        greedy(110, 3, 25),
        greedy(200, 3, 8),
        greedy(300, 4, 15),
        greedy(400, 4, 100),
        greedy(700, 8, 20),
        greedy(250, 3, 100),
        greedy(9, 5, 200),
        drawn(20, 2, 20, 1),
        drawn(40, 6, 10, 3),
        drawn(250, 4, 12, 2),
        searched(30, 2, 9, 2),
        searched(3, 7, 14, 3),
        searched(140, 3, 5, 2),
    ]
}

/// An engine, what was submitted to it, and what it has told.
struct Client<'t> {
    engine: Engine<'t>,
    limits: Limits,
    /// What is under way: which request, and what was told of each of its texts.
    open: BTreeMap<RequestId, (Request, HashMap<usize, Told>)>,
    /// The texts of those that are over.
    answered: BTreeMap<RequestId, (Request, Vec<Generated>)>,
}

#[derive(Default)]
struct Told {
    text: String,
    tokens: usize,
    finished: Option<Generated>,
}

impl<'t> Client<'t> {
    fn new(engine: Engine<'t>, limits: Limits) -> Self {
        Self { engine, limits, open: BTreeMap::new(), answered: BTreeMap::new() }
    }

    fn submit(&mut self, request: &Request) -> RequestId {
        let id = self.engine.submit(request.clone()).unwrap();
        let new = !self.answered.contains_key(&id);
        assert!(new && self.open.insert(id, (request.clone(), HashMap::new())).is_none(), "{id} is not new");
        id
    }

    fn cancel(&mut self, id: RequestId) {
        assert!(self.engine.cancel(id) && !self.engine.cancel(id));
        self.open.remove(&id).unwrap();
    }

    /// A step, whose news must be of what is under way, and which must not take more than is allowed.
    fn step(&mut self) -> bool {
        let (open, answered) = (&mut self.open, &mut self.answered);
        let more = self.engine.step(&mut |news| hear(open, answered, news)).unwrap();
        assert_eq!(more, !self.open.is_empty());
        assert_eq!(more, !self.engine.is_idle());
        self.check_limits();
        more
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    fn submit_all(&mut self, requests: &[Request]) -> Vec<RequestId> {
        requests.iter().map(|request| self.submit(request)).collect()
    }

    fn check_limits(&self) {
        let (engine, limits) = (&self.engine, self.limits);
        assert!(engine.active() <= limits.slots, "{} texts side by side", engine.active());
        assert!(
            engine.cache_bytes() <= limits.cache_bytes,
            "{} of {}",
            engine.cache_bytes(),
            limits.cache_bytes
        );
    }

    /// Steps until nothing is left: in no more steps than it takes to do one after the other.
    fn finish(&mut self) {
        let steps = |(Request { prompt, settings }, _): &(Request, _)| {
            settings.num_return_sequences * (settings.max_new_tokens + prompt.len().div_ceil(256) + 2)
        };
        let most: usize = self.open.values().map(steps).sum();
        for _ in 0..most {
            if !self.step() {
                return;
            }
        }
        assert!(self.open.is_empty(), "{} are left after {most} steps", self.open.len());
    }
}

fn hear(
    open: &mut BTreeMap<RequestId, (Request, HashMap<usize, Told>)>,
    answered: &mut BTreeMap<RequestId, (Request, Vec<Generated>)>,
    news: News,
) {
    let (_, texts) = open.get_mut(&news.request).expect("news of what is under way alone");
    let told = texts.entry(news.sequence).or_default();
    assert!(told.finished.is_none(), "news of a text that is over");
    told.text.push_str(news.text);
    told.tokens += news.tokens;
    if let Some(generated) = news.finished {
        assert_eq!((&told.text, told.tokens), (&generated.text, generated.ids.len()));
        told.finished = Some(generated.clone());
    }
    if news.last {
        let (request, mut texts) = open.remove(&news.request).unwrap();
        let sequences = 0..request.settings.num_return_sequences;
        let finished = sequences.map(|place| texts.remove(&place).unwrap().finished.unwrap()).collect();
        answered.insert(news.request, (request, finished));
    }
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Submit(usize),
    Steps(usize),
    /// One of those under way, by its place among them.
    Cancel(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => (0..pool().len()).prop_map(Action::Submit),
        3 => (0..25usize).prop_map(Action::Steps),
        1 => (0..100usize).prop_map(Action::Cancel),
    ];
    proptest::collection::vec(action, 1..24)
}

#[test]
fn in_every_schedule_a_request_gives_the_texts_that_it_gives_alone() {
    let bench = Bench::new();
    let (pool, alone) = (pool(), bench.alone(&pool()));
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let schedule = (actions(), 1..6usize, 768..2500usize);
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    runner
        .run(&schedule, |(actions, slots, tokens)| {
            let limits = Limits { slots, cache_bytes: bench.tokens(tokens) };
            let mut client = Client::new(bench.engine(limits), limits);
            for action in actions {
                match action {
                    Action::Submit(which) => {
                        client.submit(&pool[which]);
                    }
                    Action::Steps(steps) => client.steps(steps),
                    Action::Cancel(_) if client.open.is_empty() => {}
                    Action::Cancel(which) => {
                        let id = *client.open.keys().nth(which % client.open.len()).unwrap();
                        client.cancel(id);
                    }
                }
            }
            client.finish();
            for (request, texts) in client.answered.values() {
                let which = pool.iter().position(|other| other == request).unwrap();
                prop_assert_eq!(texts, &alone[which], "request {} of the pool", which);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn who_comes_in_the_middle_is_answered_beside_those_under_way() {
    let bench = Bench::new();
    let requests = [greedy(9, 5, 100), greedy(300, 4, 15), greedy(300, 8, 15), greedy(300, 9, 15)];
    let alone = bench.alone(&requests);
    assert_eq!(alone[0][0].ids.len(), 100);
    let mut client = Client::new(bench.engine(LARGE), LARGE);
    let first = client.submit(&requests[0]);
    client.steps(10);
    let others = client.submit_all(&requests[1..]);
    // their prompts are read one a step, and the first one gets its token in each
    for count in 1..4 {
        client.step();
        let tokens = |id: &RequestId| client.open[id].1.get(&0).map_or(0, |told| told.tokens);
        assert_eq!(tokens(&first), 11 + count); // the first step gave two
        assert_eq!(others.iter().filter(|id| tokens(id) > 0).count(), count);
    }
    client.steps(13);
    assert_eq!(client.engine.active(), 1);
    for (id, expected) in others.iter().zip(&alone[1..]) {
        assert_eq!(&client.answered[id].1, expected);
    }
    client.finish();
    assert_eq!(client.answered[&first].1, alone[0]);
}

/// Who needs more room than there is beside the others gets it although smaller ones go on coming.
#[test]
fn smaller_requests_and_searches_keep_nobody_waiting_for_ever() {
    let bench = Bench::new();
    for patient in [greedy(400, 4, 100), searched(30, 2, 9, 4)] {
        let limits = Limits { slots: 4, cache_bytes: bench.tokens(512) };
        for other in [greedy(60, 2, 20), searched(3, 7, 14, 3)] {
            let mut client = Client::new(bench.engine(limits), limits);
            for _ in 0..6 {
                client.submit(&other);
            }
            client.step();
            let id = client.submit(&patient);
            let mut steps = 0;
            while client.open.contains_key(&id) {
                client.submit(&other);
                client.step();
                steps += 1;
                assert!(steps < 250, "{} requests were answered before", client.answered.len());
            }
            assert_eq!(client.answered[&id].1, bench.alone(std::slice::from_ref(&patient))[0]);
        }
    }
}

#[test]
fn what_is_cancelled_gives_no_news_and_its_slots_are_free_at_once() {
    let bench = Bench::new();
    let requests = pool();
    let alone = bench.alone(&requests);
    let limits = Limits { slots: 3, cache_bytes: bench.tokens(3 * POSITIONS) };
    let mut client = Client::new(bench.engine(limits), limits);
    // after so many steps: before any, in prefill and in decode, and in a search
    for steps in [0, 1, 2, 3, 5, 9, 40] {
        for which in [0..requests.len(), 15..requests.len(), 7..10] {
            let ids = client.submit_all(&requests[which]);
            client.steps(steps);
            for id in ids {
                if client.open.contains_key(&id) {
                    client.cancel(id);
                }
            }
            assert_eq!((client.engine.active(), client.engine.is_idle()), (0, true));
            assert!(!client.step(), "nothing is left after {steps} steps");
        }
    }
    assert!(!client.engine.cancel(0) && !client.engine.cancel(usize::MAX));
    client.answered.clear();
    client.submit_all(&requests);
    client.finish();
    let again: Vec<_> = client.answered.values().map(|(_, texts)| texts.clone()).collect();
    assert_eq!(again, alone);
    assert_eq!(client.engine.run(&requests, &mut |_| Ok(())).unwrap(), alone);
}

#[test]
fn a_slot_that_was_cancelled_serves_who_waits_for_it() {
    let bench = Bench::new();
    let limits = Limits { slots: 1, ..LARGE };
    let mut client = Client::new(bench.engine(limits), limits);
    let first = client.submit(&greedy(9, 5, 200));
    client.step();
    let second = client.submit(&greedy(60, 2, 20));
    client.step();
    client.cancel(first);
    client.steps(20);
    assert_eq!(client.answered[&second].1, bench.alone(&[greedy(60, 2, 20)])[0]);
}

/// As in a conversation: the next prompt is the last one, what was answered, and more.
#[test]
fn a_prompt_that_goes_on_from_a_text_shares_what_was_read_of_it_and_no_more() {
    let bench = Bench::new();
    let request = greedy(60, 2, 20);
    let text = bench.alone(std::slice::from_ref(&request)).remove(0).remove(0);
    assert_eq!(text.ids.len(), 20);
    let mut client = Client::new(bench.engine(LARGE), LARGE);
    for steps in 1..20 {
        for cancelled in [true, false] {
            let id = client.submit(&request);
            client.steps(steps);
            if cancelled && client.open.contains_key(&id) {
                client.cancel(id);
            }
            let next =
                Request { prompt: [&request.prompt, &text.ids[..], &[5, 6]].concat(), ..request.clone() };
            let next_id = client.submit(&next);
            client.finish();
            assert_eq!(client.answered[&next_id].1, bench.alone(&[next])[0], "{steps} {cancelled}");
        }
    }
}

#[test]
fn slots_grow_in_number_or_in_size_and_stay_within_the_limit() {
    let bench = Bench::new();
    // more slots: those under way are in the last one, and what the idle ones have read is larger than they become
    let limits = Limits { slots: 8, cache_bytes: bench.tokens(3 * 512) };
    let mut client = Client::new(bench.engine(limits), limits);
    let large = client.submit_all(&[greedy(450, 3, 50), greedy(450, 4, 50)]);
    let stays = greedy(9, 5, 40);
    client.submit(&stays);
    client.steps(3);
    large.into_iter().for_each(|id| client.cancel(id));
    let more = [greedy(280, 7, 60), greedy(280, 8, 60), greedy(280, 9, 60)];
    client.submit_all(&more);
    client.finish();
    let texts = |client: &Client| -> Vec<Vec<Generated>> {
        client.answered.values().map(|(_, texts)| texts.clone()).collect()
    };
    assert_eq!(texts(&client), bench.alone(&[&[stays], &more[..]].concat()));

    // fewer slots, each larger
    let limits = Limits { slots: 4, cache_bytes: bench.tokens(512) };
    let mut client = Client::new(bench.engine(limits), limits);
    let ids = client.submit_all(&[1, 2, 3, 5].map(|kind| greedy(9, kind, 100)));
    client.step();
    assert_eq!(client.engine.active(), 4);
    ids[..3].iter().for_each(|&id| client.cancel(id));
    client.submit(&greedy(110, 3, 100));
    client.step();
    assert_eq!(client.engine.active(), 2);
    client.finish();
    assert_eq!(texts(&client), bench.alone(&[greedy(9, 5, 100), greedy(110, 3, 100)]));
}

#[test]
fn what_can_not_be_generated_is_refused_and_changes_nothing() {
    let bench = Bench::new();
    let limits = Limits { slots: 2, cache_bytes: bench.tokens(POSITIONS) };
    let mut client = Client::new(bench.engine(limits), limits);
    let id = client.submit(&greedy(9, 5, 100));
    client.step();
    let mut stops = searched(3, 0, 5, 2);
    stops.settings.stop = vec!["x".to_owned()];
    for (request, said) in [
        (greedy(0, 0, 5), "a prompt of 0 tokens"),
        (greedy(POSITIONS, 0, 5), "a prompt of 1024 tokens, the model has 1024 positions"),
        (Request { prompt: vec![1, 407, 2], ..greedy(1, 0, 5) }, "has the token 407, the model has 407"),
        (greedy(1, 0, 0), "max_new_tokens is 0"),
        (searched(600, 0, 5, 2), "cache is too large"),
        (searched(3, 0, usize::MAX, 4096), "cache is too large"),
        (stops, "stop is given and num_beams is 2"),
    ] {
        let error = client.engine.submit(request.clone()).unwrap_err();
        assert!(error.to_string().contains(said), "{error:#}");
        assert_eq!(tk::error::exit_code(&error), 2);
        let all = [greedy(1, 0, 5), request];
        let error = bench.engine(limits).run(&all, &mut |_| panic!("nothing is done")).unwrap_err();
        assert!(error.to_string().contains(said), "{error:#}");
    }
    assert!(client.engine.run(&[greedy(1, 0, 5)], &mut |_| Ok(())).is_err(), "another is under way");
    client.finish();
    assert_eq!(client.answered[&id].1, bench.alone(&[greedy(9, 5, 100)])[0]);
    let mut none = bench.engine(Limits { slots: 0, ..LARGE });
    assert!(none.submit(greedy(1, 0, 5)).is_err());
}

#[test]
fn after_an_error_the_engine_is_idle_and_generates_for_others() {
    let bench = Bench::new();
    let requests = pool();
    let alone = bench.alone(&requests);
    let mut engine = bench.engine(LARGE);
    for after in [1, 2, 50, 300] {
        let mut told = 0;
        let result = engine.run(&requests, &mut |_| {
            told += 1;
            anyhow::ensure!(told < after, "the reader is gone");
            Ok(())
        });
        assert_eq!((result.unwrap_err().to_string(), told), ("the reader is gone".to_owned(), after));
        assert!(engine.is_idle() && engine.active() == 0);
        assert!(!engine.step(&mut |_| panic!("nobody is left")).unwrap());
    }
    assert_eq!(engine.run(&requests, &mut |_| Ok(())).unwrap(), alone);

    // an engine that takes the model for larger than it is, so that a run of it fails
    let mut engine = Engine::new(bench.slots(), bench.tokenizer.inner(), vec![END], 2 * POSITIONS, LARGE);
    for request in [greedy(POSITIONS + 1, 0, 5), searched(POSITIONS + 1, 0, 5, 2), greedy(POSITIONS, 9, 9)] {
        let fails = engine.submit(request).unwrap();
        let beside = engine.submit(greedy(9, 5, 100)).unwrap();
        assert!((0..150).any(|_| engine.step(&mut |_| ()).is_err()));
        assert!(engine.is_idle() && engine.active() == 0 && engine.cache_bytes() == 0);
        assert!(!engine.cancel(fails) && !engine.cancel(beside));
        assert_eq!(engine.run(&requests, &mut |_| Ok(())).unwrap(), alone);
    }
}

/// A server's thread may have one.
#[test]
fn an_engine_goes_to_another_thread() {
    fn goes<T: Send>() {}
    goes::<Engine>();
}
