//! What comes in from outside: adapters under their names, and requests, refused here or sure to end.

use super::Scheduler;
use super::residency::PinChange;
use crate::adapter_cache::AdapterContent;
use crate::error::Error;
use crate::ids::{ActingAdapter, AdapterId, Applied, CacheScope, PrefixIdentity, RequestId};
use crate::request::{NewRequest, Request};
use crate::sequence::{Sequence, Waiting};
use crate::speculation::Speculation;

/// The weights of one content, under all its names.
#[derive(Debug, Clone, Copy, Default)]
struct WeightSum {
    sum: f64,
    /// Of the weights without their signs.
    magnitude: f64,
}

impl WeightSum {
    /// Of f32 weights that cancel, as 0.1 + 0.2 - 0.3, no more than this part is left, of rounding.
    const ROUNDING: f64 = 1e-6;

    fn add(&mut self, weight: f32) {
        self.sum += f64::from(weight);
        self.magnitude += f64::from(weight.abs());
    }

    /// Zero if the weights cancel.
    fn weight(self) -> f32 {
        if self.sum.abs() <= self.magnitude * Self::ROUNDING {
            0.0
        } else {
            self.sum as f32
        }
    }
}

impl Scheduler {
    /// Makes an adapter known under a name; the same name with the same content is the same adapter.
    pub fn register_adapter(
        &mut self,
        name: &str,
        content: AdapterContent,
    ) -> Result<AdapterId, Error> {
        let num_pages = self.adapter_pages(name, content.nbytes)?;
        self.memory.adapters.register(name, content, num_pages)
    }

    /// As `register_adapter`, and takes the name from other content, at once and with its pin.
    ///
    /// Requests accepted by now finish with what they were accepted with. On an error nothing has changed.
    pub fn replace_adapter(
        &mut self,
        name: &str,
        content: AdapterContent,
    ) -> Result<AdapterId, Error> {
        let num_pages = self.adapter_pages(name, content.nbytes)?;
        self.check_pin_passes_on(name, &content.key, num_pages)?;
        let replaced = self.memory.adapters.replace(name, content, num_pages);
        let (adapter, slot) = replaced?;
        self.memory.free_slot(slot);
        if self.memory.adapters.entry(adapter).is_pinned() {
            self.prefetch(adapter);
        }
        Ok(adapter)
    }

    /// Pages of an adapter that leaves at least one to the KV cache.
    fn adapter_pages(&self, name: &str, nbytes: usize) -> Result<usize, Error> {
        let num_pages = nbytes.div_ceil(self.config.page_nbytes).max(1);
        if num_pages < self.config.num_pages {
            return Ok(num_pages);
        }
        Err(Error::AdapterTooLarge {
            name: name.to_owned(),
            needed: nbytes,
            needed_pages: num_pages,
            available: self.config.pool_nbytes(),
            available_pages: self.config.num_pages,
        })
    }

    /// Accepted requests finish, new ones are refused, memory is freed once no one uses the adapter.
    pub fn unregister_adapter(&mut self, name: &str) -> Result<(), Error> {
        let slot = self.memory.adapters.unregister(name)?;
        self.memory.free_slot(slot);
        Ok(())
    }

    pub fn submit(&mut self, mut new: NewRequest) -> Result<RequestId, Error> {
        new.validate(self.config.max_model_len)?;
        let (adapters, uninvoked) = self.resolve_adapters(&new)?;
        if new.needs_adapter && adapters.is_empty() {
            return Err(Error::OnlyBaseModelLeft);
        }
        let max_tokens = self.max_tokens(&new, &adapters)?;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        for adapter in uninvoked {
            self.memory.adapters.count_uninvoked(adapter);
        }
        for applied in &adapters {
            self.memory.adapters.add_user(applied.adapter);
        }
        let identity = self.identity(new.scope, &adapters);
        let guesses = self.config.max_draft_tokens > 0 && !new.without_guesses && max_tokens > 0;
        let speculation = guesses.then(|| {
            let answers = self.answers.of(&identity);
            Speculation::new(answers, new.prompt.len())
        });
        let flow = self.flows.arrive(&new.flow, id);
        let sequence = Sequence {
            prompt_len: new.prompt.len(),
            next_row: new.prompt_rows.first(new.prompt.len()),
            num_charged: 0,
            tokens: new.prompt,
            was_admitted: false,
            was_set_back: false,
            speculation,
            request: Request {
                id,
                flow,
                identity,
                adapters,
                max_tokens,
                min_tokens: new.min_tokens,
                stop_token_ids: new.stop_token_ids,
            },
        };
        self.waiting.push_back(Waiting {
            sequence,
            overtaken: 0,
            unfit_at: None,
        });
        Ok(id)
    }

    /// Checked names as what will run: one weight per content, ordered by id, without what adds up to zero; and apart
    /// from them what the prompt does not invoke.
    fn resolve_adapters(
        &self,
        new: &NewRequest,
    ) -> Result<(Vec<Applied<AdapterId>>, Vec<AdapterId>), Error> {
        let mut sums: Vec<(AdapterId, WeightSum)> = Vec::with_capacity(new.adapters.len());
        for (name, weight) in &new.adapters {
            let adapter = self.memory.adapters.resolve(name)?;
            let index = sums.iter().position(|&(other, _)| other == adapter);
            let index = index.unwrap_or_else(|| {
                sums.push((adapter, WeightSum::default()));
                sums.len() - 1
            });
            let sum = &mut sums[index].1;
            sum.add(*weight);
            if !sum.weight().is_finite() {
                return Err(Error::BadWeight {
                    name: name.clone(),
                    weight: *weight,
                });
            }
        }
        let (mut adapters, mut uninvoked) = (Vec::with_capacity(sums.len()), Vec::new());
        for (adapter, sum) in sums {
            let weight = sum.weight();
            let content = &self.memory.adapters.entry(adapter).content;
            match content.first_token(&new.prompt) {
                _ if weight == 0.0 => {}
                None => uninvoked.push(adapter),
                Some(first_token) => adapters.push(Applied {
                    adapter,
                    weight,
                    first_token,
                }),
            }
        }
        adapters.sort_by_key(|applied| applied.adapter);
        Ok((adapters, uninvoked))
    }

    fn identity(&self, scope: CacheScope, adapters: &[Applied<AdapterId>]) -> PrefixIdentity {
        let acting = adapters.iter().map(|applied| ActingAdapter {
            key: self
                .memory
                .adapters
                .entry(applied.adapter)
                .content
                .key
                .clone(),
            weight_bits: applied.weight.to_bits(),
            first_token: applied.first_token,
        });
        PrefixIdentity::new(scope, acting)
    }

    /// How many tokens the answer may have: as many as asked for, or else as fit.
    fn max_tokens(
        &self,
        new: &NewRequest,
        adapters: &[Applied<AdapterId>],
    ) -> Result<usize, Error> {
        let prompt = new.prompt.len();
        if let Some(max_tokens) = new.max_tokens {
            self.check_capacity(prompt + max_tokens, adapters)?;
            return Ok(max_tokens);
        }
        self.check_capacity(prompt + new.min_tokens.max(1), adapters)?;
        let ids: Vec<_> = adapters.iter().map(|applied| applied.adapter).collect();
        let taken = self.memory.adapters.pinned().num_pages
            + self.demand(0, &ids, PinChange::default()).adapter_pages;
        let num_tokens = (self.config.num_pages - taken) * self.config.block_size;
        Ok(num_tokens.min(self.config.max_model_len) - prompt)
    }

    /// Refuses what could not run alone in a pool with only the pinned adapters.
    fn check_capacity(
        &self,
        num_tokens: usize,
        adapters: &[Applied<AdapterId>],
    ) -> Result<(), Error> {
        let limit = self.config.max_num_slots;
        if adapters.len() > limit {
            let count = adapters.len();
            return Err(Error::TooManyAdapters { count, limit });
        }
        let kv_pages = num_tokens.div_ceil(self.config.block_size);
        let extents = adapters
            .iter()
            .map(|applied| self.memory.adapters.entry(applied.adapter).num_pages);
        let adapter_pages: usize = extents.sum();
        if kv_pages + adapter_pages <= self.config.num_pages {
            return self.check_room_beside_pinned(num_tokens, adapters);
        }
        Err(Error::RequestTooLarge {
            needed: (kv_pages + adapter_pages) * self.config.page_nbytes,
            kv_pages,
            adapter_pages,
            available: self.config.pool_nbytes(),
            available_pages: self.config.num_pages,
        })
    }

    fn check_room_beside_pinned(
        &self,
        num_tokens: usize,
        adapters: &[Applied<AdapterId>],
    ) -> Result<(), Error> {
        let ids: Vec<_> = adapters.iter().map(|applied| applied.adapter).collect();
        let pinned = self.memory.adapters.pinned();
        let demand = self.demand(num_tokens, &ids, PinChange::default());
        if self.fits(demand, pinned) {
            return Ok(());
        }
        if demand.num_slots + pinned.num_adapters > self.config.max_num_slots {
            return Err(Error::TooManyAdapters {
                count: demand.num_slots,
                limit: self.config.max_num_slots - pinned.num_adapters,
            });
        }
        Err(Error::NoRoomForRequest {
            kv_pages: demand.kv_pages,
            adapter_pages: demand.adapter_pages,
            available_pages: self.config.num_pages - pinned.num_pages,
        })
    }
}
