//! Records that are too many to be held → a buffer of them at a time. Buffers are equally long: behind the last record
//! comes the first one again. So the number of a buffer says where it begins, and a resumed run finds its place.

use indicatif::HumanCount;

use super::prepare::Job;
use crate::data::records::{Files, How, Numbered};
use crate::say::Say;
use crate::task::{Encoder, Example, Task};
use crate::{Result, bail_unusable};

type Reading<'a> = Box<dyn Iterator<Item = Result<Numbered>> + Send + 'a>;

/// The records to learn from, as they are read.
pub struct Stream<'a> {
    files: &'a Files,
    how: &'a How,
    /// Records of a buffer.
    size: usize,
    /// All there are, once they were counted.
    records: Option<usize>,
    /// Stands behind so many records, of all that were read.
    reading: Reading<'a>,
    read: usize,
}

impl<'a> Stream<'a> {
    /// The job's records, of which `how` says how they stand in their files; none where the run holds them all.
    pub fn of(job: &Job<'a>, how: &'a How) -> Option<Self> {
        let (files, size) = (job.train, job.settings.shuffle_buffer?);
        Some(Self { files, how, size, records: None, reading: Box::new(files.read(how)), read: 0 })
    }

    /// The records of the first buffer: what is to be learnt is found in them.
    ///
    /// # Errors
    /// Unusable: they can't be read, or there are none.
    pub fn first(&mut self) -> Result<Files> {
        self.records(0)
    }

    /// Reads all records once without making anything of them, and counts them. Returns how many there are.
    ///
    /// # Errors
    /// Unusable: records that can't be learnt from.
    pub fn check(&mut self, job: &Job, task: &Task, say: &Say) -> Result<usize> {
        let bar = say.bar(0, "{human_pos} records read, none learnt from yet")?;
        let (mut reading, mut records) = (self.files.read(self.how), 0);
        loop {
            let part: Vec<Numbered> = reading.by_ref().take(self.size).collect::<Result<_>>()?;
            if part.is_empty() {
                break;
            }
            let count = part.len();
            if let Err(error) = task.check_learnt(&self.files.holding(part), job.records) {
                // what the first buffer has said of all
                return Err(error.context(format!(
                    "what is learnt was found in the first {} records (--shuffle-buffer)",
                    HumanCount(self.size as u64)
                )));
            }
            records += count;
            bar.set_position(records as u64);
        }
        bar.finish_and_clear();
        self.records = Some(records);
        self.size = self.size.min(records);
        say.line(format!(
            "{} of {} records are held at a time",
            HumanCount(self.size as u64),
            HumanCount(records as u64)
        ));
        Ok(records)
    }

    /// How many records there are, once they were counted.
    pub fn counted(&self) -> Option<usize> {
        self.records
    }

    /// How many passes over all records so many buffers are.
    pub fn passes(&self, buffers: f64) -> f64 {
        buffers * self.size as f64 / self.records.unwrap_or(self.size).max(1) as f64
    }

    /// The examples of the `buffer`-th buffer, from 0.
    ///
    /// # Errors
    /// The files are not any more as they were.
    pub fn examples(&mut self, buffer: usize, task: &Task, encoder: &Encoder) -> Result<Vec<Example>> {
        let records = self.records(buffer)?;
        task.learnt(&records, encoder)
    }

    /// The records of a buffer; the first alone before they were counted.
    fn records(&mut self, buffer: usize) -> Result<Files> {
        let first = match self.records {
            // in wide numbers: the buffer's comes from a file
            Some(records) => (buffer as u128 * self.size as u128 % records.max(1) as u128) as usize,
            None => 0,
        };
        if self.read != first {
            self.begin();
            while self.read < first && self.next()?.is_some() {}
        }
        let mut held = Vec::with_capacity(self.size.min(1 << 20));
        while held.len() < self.size {
            match self.next()? {
                Some(record) => held.push(record),
                // all of them were counted: the first one comes again
                None if self.records.is_some() && self.read > 0 => self.begin(),
                None => break,
            }
        }
        if held.is_empty() {
            bail_unusable!("{} has no records", self.files);
        }
        if self.records.is_some() && held.len() < self.size {
            bail_unusable!("{} has lost records since the run began to read", self.files);
        }
        Ok(self.files.holding(held))
    }

    fn begin(&mut self) {
        (self.reading, self.read) = (Box::new(self.files.read(self.how)), 0);
    }

    fn next(&mut self) -> Result<Option<Numbered>> {
        let next = self.reading.next().transpose()?;
        self.read += usize::from(next.is_some());
        Ok(next)
    }
}
