//! A pretend device: executes steps on an array of words and computes "KV" that depends on everything before it.
//!
//! The KV of a token mixes the KV before it, read back through the block table, the token, and the words found in
//! the extents of its segments. A wrong page, slot, segment, weight or stale prefix changes every later token.

use std::collections::{BTreeMap, HashMap};

use loraserve_core::{Batch, SchedulerOutput};

const GARBAGE: u64 = 0xdead_beef_dead_beef;

#[derive(Debug, Clone, Copy)]
struct Extent {
    first_page: usize,
    num_pages: usize,
}

pub struct Device {
    block_size: usize,
    /// `[page][offset]`
    pages: Vec<Vec<u64>>,
    slots: HashMap<i32, Extent>,
    loading: BTreeMap<u32, i32>,
    /// What the last batch sampled.
    samples: Vec<i32>,
    /// "Hidden states" of the rows that the last batch was to give out.
    pub hidden: Vec<u64>,
}

/// What an adapter's extent is filled with.
pub fn adapter_word(content_hash: &str) -> u64 {
    content_hash
        .bytes()
        .fold(17, |word, byte| mix(word, u64::from(byte)))
}

/// The KV of a token after `before`, with the adapters' (weight, word) in wave order.
pub fn kv(before: u64, token: i32, adapters: impl IntoIterator<Item = (f32, u64)>) -> u64 {
    let folded = adapters.into_iter().fold(1, |sum, (weight, word)| {
        mix(mix(sum, u64::from(weight.to_bits())), word)
    });
    mix(mix(before, token as u64), folded)
}

/// The token a sequence goes on with after `kv`; few values, so that stop tokens and shared prefixes happen.
pub fn sample(kv: u64) -> i32 {
    (kv >> 20) as i32 & 7
}

impl Device {
    pub fn new(num_pages: usize, block_size: usize) -> Self {
        Self {
            block_size,
            pages: vec![vec![GARBAGE; block_size]; num_pages],
            slots: HashMap::new(),
            loading: BTreeMap::new(),
            samples: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// Executes moves, starts loads, runs the batch; returns the sampled tokens.
    pub fn run(&mut self, step: &SchedulerOutput) -> Vec<i32> {
        for m in &step.moves {
            let (src, dst, num_pages) = (m.src_page.index(), m.dst_page.index(), m.num_pages);
            let extent = self
                .slots
                .get_mut(&(m.slot.0 as i32))
                .expect("a moved slot is loaded");
            assert_eq!((extent.first_page, extent.num_pages), (src, num_pages));
            extent.first_page = dst;
            let copied = self.pages[src..src + num_pages].to_vec();
            self.pages[dst..dst + num_pages].clone_from_slice(&copied);
        }
        for load in &step.loads {
            let extent = Extent {
                first_page: load.first_page.index(),
                num_pages: load.num_pages,
            };
            self.slots.insert(load.slot.0 as i32, extent);
            self.loading.insert(load.adapter.0, load.slot.0 as i32);
            self.fill(extent, GARBAGE);
        }
        step.batch
            .as_ref()
            .map_or_else(Vec::new, |batch| self.run_batch(batch))
    }

    pub fn loading(&self) -> Vec<u32> {
        self.loading.keys().copied().collect()
    }

    /// The pages that a load under way goes to.
    pub fn extent(&self, adapter: u32) -> std::ops::Range<usize> {
        let extent = self.slots[&self.loading[&adapter]];
        extent.first_page..extent.first_page + extent.num_pages
    }

    /// Ends a load; without a word it has failed.
    pub fn finish_load(&mut self, adapter: u32, word: Option<u64>) {
        let slot = self
            .loading
            .remove(&adapter)
            .expect("the adapter is loading");
        let extent = self.slots[&slot];
        self.fill(extent, word.unwrap_or(GARBAGE));
    }

    fn fill(&mut self, extent: Extent, word: u64) {
        for page in &mut self.pages[extent.first_page..extent.first_page + extent.num_pages] {
            page.fill(word);
        }
    }

    fn run_batch(&mut self, batch: &Batch) -> Vec<i32> {
        check_shapes(batch);
        let adapters = self.adapters_of_tokens(batch);
        let mut computed = vec![0; batch.num_tokens()];
        for seq in 0..batch.num_seqs() {
            let table = slice(&batch.block_table, &batch.block_table_indptr, seq);
            let rows = batch.query_indptr[seq] as usize..batch.query_indptr[seq + 1] as usize;
            for row in rows.clone() {
                let position = batch.positions[row] as usize;
                let page = table[position / self.block_size] as usize;
                let offset = position % self.block_size;
                assert_eq!(
                    batch.slot_mapping[row] as usize,
                    page * self.block_size + offset,
                    "a token is written into its own sequence's page"
                );
                let before = position.checked_sub(1).map_or(0, |position| {
                    self.pages[table[position / self.block_size] as usize]
                        [position % self.block_size]
                });
                let token = self.token(batch.token_ids[row]);
                computed[row] = kv(before, token, adapters[row].iter().copied());
                self.pages[page][offset] = computed[row];
            }
            let end = batch.positions[rows.end - 1] + 1;
            assert_eq!(
                batch.context_lens[seq], end,
                "the context ends at the last token"
            );
        }
        let rows = batch.hidden_indices.iter();
        self.hidden = rows.map(|&row| computed[row as usize]).collect();
        let rows = batch.logits_indices.iter();
        self.samples = rows.map(|&row| sample(computed[row as usize])).collect();
        self.samples.clone()
    }

    /// A token of a batch, which may be a sample of the last one.
    fn token(&self, token: i32) -> i32 {
        if token < 0 {
            self.samples[(-1 - token) as usize]
        } else {
            token
        }
    }

    /// For each token the (weight, word) of its segments, wave by wave.
    fn adapters_of_tokens(&self, batch: &Batch) -> Vec<Vec<(f32, u64)>> {
        let mut adapters = vec![Vec::new(); batch.num_tokens()];
        for wave in batch.wave_indptr.windows(2) {
            let mut free_from = 0;
            for segment in wave[0] as usize..wave[1] as usize {
                let (start, end) = (batch.seg_start[segment], batch.seg_end[segment]);
                assert!(
                    free_from <= start && start < end,
                    "segments of a wave are disjoint"
                );
                free_from = end;
                let word = self.word_in(batch.seg_slot[segment]);
                for token in start..end {
                    adapters[token as usize].push((batch.seg_weight[segment], word));
                }
            }
        }
        adapters
    }

    fn word_in(&self, slot: i32) -> u64 {
        let extent = self.slots[&slot];
        let pages = &self.pages[extent.first_page..extent.first_page + extent.num_pages];
        let word = pages[0][0];
        assert!(
            pages.iter().flatten().all(|&other| other == word),
            "slot {slot} is whole"
        );
        word
    }
}

fn slice<'a>(values: &'a [i32], indptr: &[i32], index: usize) -> &'a [i32] {
    &values[indptr[index] as usize..indptr[index + 1] as usize]
}

fn check_shapes(batch: &Batch) {
    let (num_tokens, num_seqs) = (batch.num_tokens(), batch.num_seqs());
    assert_eq!(batch.positions.len(), num_tokens);
    assert_eq!(batch.slot_mapping.len(), num_tokens);
    assert_eq!(batch.query_indptr.len(), num_seqs + 1);
    assert_eq!(batch.block_table_indptr.len(), num_seqs + 1);
    assert_eq!(batch.logits_indices.len(), batch.sample_request_ids.len());
    let num_rows = batch.hidden_spans.iter().map(|span| span.num_rows);
    assert_eq!(batch.hidden_indices.len(), num_rows.sum());
    assert!(batch.hidden_indices.is_sorted_by(|a, b| a < b));
    assert_eq!(
        *batch.wave_indptr.last().unwrap() as usize,
        batch.seg_start.len()
    );
    let mut written = batch.slot_mapping.clone();
    written.sort_unstable();
    assert!(
        written.windows(2).all(|pair| pair[0] != pair[1]),
        "no cell is written twice"
    );
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x2545_f491_4f6c_dd1d);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) ^ (x >> 31)
}
