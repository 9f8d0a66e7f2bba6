//! `Trace`: a hash over all that a scheduler decided and answered; equal runs have equal traces.

use loraserve_core::{FinishReason, RequestOutput, SchedulerOutput, SchedulerStats};

/// FNV-1a over words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace(u64);

impl Default for Trace {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Trace {
    pub fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0100_0000_01b3);
    }

    fn add_all(&mut self, words: impl IntoIterator<Item = u64>) {
        words.into_iter().for_each(|word| self.add(word));
        self.add(u64::MAX); // where one list ends and the next begins
    }

    pub fn add_step(&mut self, step: &SchedulerOutput) {
        self.add(step.id);
        for m in &step.moves {
            let pages = [m.src_page, m.dst_page].map(|page| u64::from(page.0));
            self.add_all(pages.into_iter().chain([u64::from(m.slot.0)]));
        }
        for load in &step.loads {
            let ids = [load.adapter.0, load.slot.0, load.first_page.0].map(u64::from);
            self.add_all(ids.into_iter().chain([load.num_pages as u64]));
        }
        self.add_all(
            step.admitted
                .iter()
                .flat_map(|a| [a.request.0, a.num_cached_tokens as u64]),
        );
        let Some(batch) = &step.batch else { return };
        let arrays = [
            &batch.token_ids,
            &batch.positions,
            &batch.slot_mapping,
            &batch.query_indptr,
            &batch.context_lens,
            &batch.block_table,
            &batch.block_table_indptr,
            &batch.logits_indices,
            &batch.draft_token_ids,
            &batch.hidden_indices,
            &batch.wave_indptr,
            &batch.seg_start,
            &batch.seg_end,
            &batch.seg_slot,
        ];
        for array in arrays {
            self.add_all(array.iter().map(|&value| value as u64));
        }
        self.add_all(batch.sample_request_ids.iter().copied());
        self.add_all(batch.seg_weight.iter().map(|w| u64::from(w.to_bits())));
    }

    pub fn add_output(&mut self, output: &RequestOutput) {
        let finish = match &output.finish {
            None => 0,
            Some(FinishReason::Stop) => 1,
            Some(FinishReason::Length) => 2,
            Some(FinishReason::Abort) => 3,
            Some(FinishReason::Error(_)) => 4,
        };
        let token = output.token.map_or(u64::MAX, |token| token as u64);
        self.add_all([output.request.0, token, finish]);
    }

    pub fn add_stats(&mut self, stats: &SchedulerStats) {
        let counts = [
            stats.num_running,
            stats.num_waiting,
            stats.num_resident_adapters,
            stats.num_free_pages,
            stats.num_kv_pages,
            stats.num_cached_pages,
        ];
        self.add_all(counts.map(|count| count as u64));
        self.add_all([stats.num_adapter_evictions, stats.num_preemptions]);
    }
}
