//! `LoRA` on the embedding and on the head, which lie beside the layers.
//!
//! ```text
//! embedding   E[t] + scale · B·A[:, t]      A [rank, tokens], B [hidden, rank]
//! head        as of any linear              A [rank, hidden], B [tokens, rank]
//! ```

use std::collections::BTreeMap;

use crate::bind::{Factors, check_dtype, matrix_shape};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::shape::BaseShape;
use crate::tensor_name::TokenModule;
use crate::weights::Source;

/// No layer: patterns that choose layers do not choose these modules.
const NO_LAYER: usize = usize::MAX;

/// `LoRA` on one of the two.
#[derive(Debug)]
pub(crate) struct TokenLora {
    pub(crate) module: TokenModule,
    pub(crate) factors: Factors,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// Rows of the embedding, or of the head.
    pub(crate) num_tokens: usize,
    pub(crate) width: usize,
}

/// Ends of the names of A and B.
fn ends(module: TokenModule) -> [&'static str; 2] {
    match module {
        TokenModule::Embedding => [".lora_embedding_A", ".lora_embedding_B"],
        TokenModule::Head => [".lora_A.weight", ".lora_B.weight"],
    }
}

/// Takes what a file has of it; `roots` as of `Names`.
pub(crate) fn take_token_loras(
    tensors: &mut BTreeMap<String, Source>,
    roots: &[String],
    config: &Config,
    shape: &BaseShape,
    max_lora_rank: usize,
) -> Result<Vec<TokenLora>> {
    let mut found = Vec::new();
    for module in TokenModule::BOTH {
        let [a, b] = ends(module).map(|end| tensors.remove(&format!("{}{end}", module.path())));
        match (a, b) {
            (Some(a), Some(b)) => {
                let lora = TokenLora::new(module, Factors { a, b }, roots, config, shape)?;
                if lora.rank > max_lora_rank {
                    return Err(Error::RankLimit {
                        module: module.name().into(),
                        rank: lora.rank,
                        limit: max_lora_rank,
                    });
                }
                found.push(lora);
            }
            (None, None) => check_untargeted(module, roots, config)?,
            (Some(only), None) | (None, Some(only)) => {
                return Err(Error::Unpaired {
                    tensor: only.name,
                    missing: "other half",
                });
            }
        }
    }
    match found.first() {
        Some(lora)
            if lora.module == TokenModule::Embedding && !config.invocation_tokens.is_empty() =>
        {
            Err(Error::field(
                "alora_invocation_tokens",
                "can't be used with embed_tokens in target_modules, which acts before an invocation too",
            ))
        }
        _ => Ok(found),
    }
}

impl TokenLora {
    fn new(
        module: TokenModule,
        factors: Factors,
        roots: &[String],
        config: &Config,
        shape: &BaseShape,
    ) -> Result<Self> {
        check_dtype(&factors.a)?;
        check_dtype(&factors.b)?;
        let ([a_rank, a_side], [b_side, b_rank]) =
            (matrix_shape(&factors.a)?, matrix_shape(&factors.b)?);
        if a_rank != b_rank {
            return Err(Error::RankPair {
                module: module.name().into(),
                a: a_rank,
                b: b_rank,
            });
        }
        if a_rank == 0 {
            return Err(Error::RankZero {
                module: module.name().into(),
            });
        }
        let Some([tokens, hidden]) = shape.tokens else {
            return Err(Error::Unbound {
                tensor: factors.a.name,
                reason: "the base has no embedding and head that are known".into(),
            });
        };
        let (sides, [in_features, out_features]) = match module {
            TokenModule::Embedding => (["tokens", "hidden size"], [tokens, hidden]),
            TokenModule::Head => (["hidden size", "tokens"], [hidden, tokens]),
        };
        let num_tokens = match module {
            TokenModule::Embedding => a_side,
            TokenModule::Head => b_side,
        };
        if num_tokens != tokens {
            return Err(Error::UnsupportedTensor {
                tensor: factors.a.name,
                feature: "LoRA on an embedding or a head with other tokens than the base's: train the tokens with \
                          trainable_token_indices or modules_to_save",
            });
        }
        for (side, adapter, base) in [
            (sides[0], a_side, in_features),
            (sides[1], b_side, out_features),
        ] {
            if adapter != base {
                return Err(Error::Features {
                    module: module.name().into(),
                    side,
                    adapter,
                    base,
                });
            }
        }
        Ok(Self {
            module,
            rank: a_rank,
            scale: scale(module, a_rank, &factors, roots, config)?,
            factors,
            num_tokens: tokens,
            width: hidden,
        })
    }
}

/// The path that a config's patterns are matched against.
fn key(module: TokenModule, root: &str) -> String {
    match module {
        TokenModule::Embedding => format!("{root}{}", module.name()),
        TokenModule::Head => module.name().into(),
    }
}

/// Of the first root under which the config says what the tensors say; the first one's error else.
fn scale(
    module: TokenModule,
    rank: usize,
    factors: &Factors,
    roots: &[String],
    config: &Config,
) -> Result<f32> {
    let under = |root: &String| {
        let key = key(module, root);
        let expected = config.rank(&key)?;
        if rank != expected {
            return Err(Error::RankConfig {
                module: key,
                rank,
                expected,
            });
        }
        // PEFT ties LoRA on the embedding to the head without listing it.
        let is_tied = module == TokenModule::Head && config.ensures_tying;
        if config.targets.contains_token_module(&key, NO_LAYER)? == Some(false) && !is_tied {
            let tensor = factors.a.name.clone();
            return Err(Error::Untargeted { tensor });
        }
        config.scale(&key, rank, None)
    };
    let mut first_error = None;
    for root in roots {
        match under(root) {
            Ok(scale) => return Ok(scale),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.expect("invariant: there is a root"))
}

fn check_untargeted(module: TokenModule, roots: &[String], config: &Config) -> Result<()> {
    for root in roots {
        let targeted = config
            .targets
            .contains_token_module(&key(module, root), NO_LAYER)?;
        if targeted != Some(true) {
            return Ok(());
        }
    }
    Err(Error::TargetWithoutTensors {
        module: module.name().into(),
    })
}
