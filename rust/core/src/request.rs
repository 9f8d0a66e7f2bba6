//! `Request`: what a caller asks for, checked; `RequestOutput`: what it gets back.

use std::sync::Arc;

use crate::error::Error;
use crate::ids::{AdapterId, Applied, CacheScope, FlowId, PrefixIdentity, RequestId};

/// Of which tokens of its prompt a request is given the hidden states.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptRows {
    #[default]
    None,
    Last,
    All,
}

impl PromptRows {
    /// The first of these tokens; `prompt_len` where there are none.
    pub fn first(self, prompt_len: usize) -> usize {
        match self {
            Self::None => prompt_len,
            Self::Last => prompt_len - 1,
            Self::All => 0,
        }
    }
}

/// What share of the engine a flow is to have, beside others that wait: a tenth of another's weight, a tenth of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct FlowWeight(f64);

impl FlowWeight {
    pub const LEAST: f64 = 0.001;
    pub const MOST: f64 = 1000.0;

    pub fn new(weight: f64) -> Result<Self, Error> {
        if (Self::LEAST..=Self::MOST).contains(&weight) {
            return Ok(Self(weight));
        }
        Err(Error::BadFlowWeight {
            weight,
            least: Self::LEAST,
            most: Self::MOST,
        })
    }

    pub fn value(self) -> f64 {
        self.0
    }
}

impl Default for FlowWeight {
    fn default() -> Self {
        Self(1.0)
    }
}

/// Whose share of the engine a request is served from; one for all unless the caller tells them apart.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Flow {
    pub name: Arc<str>,
    pub weight: FlowWeight,
}

/// A request as the caller words it.
#[derive(Debug, Clone, Default)]
pub struct NewRequest {
    pub prompt: Vec<i32>,
    /// Names and weights; the deltas are summed.
    pub adapters: Vec<(String, f32)>,
    /// Most tokens to generate; none is as many as fit. 0 is for who wants rows of the prompt and nothing else.
    pub max_tokens: Option<usize>,
    pub prompt_rows: PromptRows,
    pub min_tokens: usize,
    pub stop_token_ids: Vec<i32>,
    pub scope: CacheScope,
    pub flow: Flow,
    /// Refuse it if its weights leave only the base model.
    pub needs_adapter: bool,
    /// Let no step guess what it goes on with.
    pub without_guesses: bool,
}

impl NewRequest {
    /// Checks everything but the adapters, and clamps `max_tokens` to the context.
    pub fn validate(&mut self, max_model_len: usize) -> Result<(), Error> {
        let tokens = self.prompt.len();
        let generates = self.max_tokens != Some(0);
        let limit = max_model_len - usize::from(generates);
        if tokens == 0 {
            return Err(Error::EmptyPrompt);
        }
        if tokens > limit {
            return Err(Error::PromptTooLong {
                tokens,
                limit,
                generates,
            });
        }
        if let Some(index) = self.prompt.iter().position(|&token| token < 0) {
            return Err(Error::NegativeToken {
                index,
                token: self.prompt[index],
            });
        }
        if !generates && self.prompt_rows == PromptRows::None {
            return Err(Error::ZeroMaxTokens);
        }
        let (min_tokens, room) = (self.min_tokens, max_model_len - tokens);
        let max_tokens = self.max_tokens.unwrap_or(room);
        if min_tokens > max_tokens {
            return Err(Error::MinTokensTooLarge {
                min_tokens,
                max_tokens,
            });
        }
        self.max_tokens = self.max_tokens.map(|max_tokens| max_tokens.min(room));
        self.check_weights()
    }

    fn check_weights(&self) -> Result<(), Error> {
        for (index, (name, weight)) in self.adapters.iter().enumerate() {
            if !weight.is_finite() {
                return Err(Error::BadWeight {
                    name: name.clone(),
                    weight: *weight,
                });
            }
            if self.adapters[..index]
                .iter()
                .any(|(earlier, _)| earlier == name)
            {
                return Err(Error::AdapterNamedTwice { name: name.clone() });
            }
        }
        Ok(())
    }
}

/// An accepted request.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: RequestId,
    pub flow: FlowId,
    /// Ordered by id; the w-th goes into wave w.
    pub adapters: Vec<Applied<AdapterId>>,
    pub identity: PrefixIdentity,
    /// 0 of one that is sampled nothing: it ends when its prompt is computed.
    pub max_tokens: usize,
    pub min_tokens: usize,
    pub stop_token_ids: Vec<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    Stop,
    Length,
    Abort,
    Error(Failure),
}

impl Request {
    pub fn adapter_ids(&self) -> impl Iterator<Item = AdapterId> + '_ {
        self.adapters.iter().map(|applied| applied.adapter)
    }
}

/// The error a request ended with after it was accepted: whoever failed gives it, the last output hands it on.
#[derive(Debug, Clone)]
pub struct Failure(Arc<dyn std::error::Error + Send + Sync>);

impl Failure {
    pub fn new(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }

    /// The error itself, if it is an `E`.
    pub fn error<E: std::error::Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

/// The same failure, not one that reads the same.
impl PartialEq for Failure {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Failure {}

/// One event of a request; the one with `finish` is its last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestOutput {
    pub request: RequestId,
    pub token: Option<i32>,
    pub finish: Option<FinishReason>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt_len: usize) -> NewRequest {
        NewRequest {
            prompt: vec![1; prompt_len],
            max_tokens: Some(4),
            ..NewRequest::default()
        }
    }

    #[test]
    fn mistakes_are_named_with_value_and_limit() {
        let adapters =
            |weights: &[(&str, f32)]| weights.iter().map(|&(n, w)| (n.to_owned(), w)).collect();
        let cases = [
            (request(0), "prompt is empty, at least one token is needed"),
            (
                request(9000),
                "prompt has 9000 tokens, limit is 8191: the context length less one token to generate",
            ),
            (
                NewRequest {
                    prompt: vec![3, -7],
                    ..request(1)
                },
                "prompt token 1 is -7, token ids start at 0",
            ),
            (
                NewRequest {
                    max_tokens: Some(0),
                    ..request(1)
                },
                "max_tokens is 0, it must be at least 1",
            ),
            (
                NewRequest {
                    max_tokens: Some(0),
                    prompt_rows: PromptRows::Last,
                    ..request(8193)
                },
                "prompt has 8193 tokens, limit is 8192: the context length",
            ),
            (
                NewRequest {
                    min_tokens: 9,
                    ..request(1)
                },
                "min_tokens is 9, limit is max_tokens = 4",
            ),
            (
                NewRequest {
                    max_tokens: None,
                    min_tokens: 8191,
                    ..request(2)
                },
                "min_tokens is 8191, limit is max_tokens = 8190",
            ),
            (
                NewRequest {
                    adapters: adapters(&[("a", f32::NAN)]),
                    ..request(1)
                },
                "adapter 'a' has weight NaN, weights must be finite",
            ),
            (
                NewRequest {
                    adapters: adapters(&[("a", 0.5), ("a", 0.5)]),
                    ..request(1)
                },
                "adapter 'a' is named twice in one request, give it one weight",
            ),
        ];
        for (mut request, message) in cases {
            assert_eq!(request.validate(8192).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn prompt_that_fills_the_context_is_taken_where_nothing_is_generated() {
        let mut request = NewRequest {
            max_tokens: Some(0),
            prompt_rows: PromptRows::All,
            ..request(32)
        };
        request.validate(32).unwrap();
        assert_eq!(request.max_tokens, Some(0));
    }

    #[test]
    fn max_tokens_is_clamped_to_the_context() {
        let mut request = NewRequest {
            max_tokens: Some(usize::MAX),
            ..request(30)
        };
        request.validate(32).unwrap();
        assert_eq!(request.max_tokens, Some(2));
    }
}
